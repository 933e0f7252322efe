"""Which memory each node of a graph reads and writes, under which state, and what follows for its order.

Dynamo's graph is not functional: ops write in place, statistics change behind undeclared arguments, and modes
are set without data edges. One run on fake tensors finds out, node by node.
"""

from collections.abc import Mapping

import torch
from torch import fx

from mpsrun.graph.facts import Effects, NodeFacts
from mpsrun.graph.fakerun import FakeRun

__all__ = ["Effects", "analyze", "drop_inert"]


def analyze(gm: fx.GraphModule) -> Effects:
    """The effects of every node, found by running the graph once on Dynamo's fake tensors.

    The values themselves, their version counters and the shape guards of Dynamo's graph stay untouched.
    """
    run = FakeRun(gm)
    run.run()
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    return Effects(run.facts, dependences(run.facts), random_chain(run.facts), run.kinds, order, run.env)


def drop_inert(gm: fx.GraphModule) -> None:
    """Take out the calls that only count how often torch's own features are used."""
    for node in gm.graph.find_nodes(op="call_function", target=torch._C._log_api_usage_once):
        gm.graph.erase_node(node)
    gm.recompile()


def dependences(facts: Mapping[fx.Node, NodeFacts]) -> dict[fx.Node, set[fx.Node]]:
    """Data edges and effect edges: read after write, write after read, write after write."""
    deps: dict[fx.Node, set[fx.Node]] = {}
    writer: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    previous: fx.Node | None = None  # among the nodes whose effects go beyond memory
    barrier: list[fx.Node] = []  # the last one, and what has come since
    for node, fact in facts.items():
        found = set(node.all_input_nodes)
        for storage in fact.reads | fact.writes:
            if storage in writer:
                found.add(writer[storage])
        for storage in fact.writes:
            found.update(readers.get(storage, ()))
            writer[storage], readers[storage] = node, []
        for storage in fact.reads - fact.writes:
            readers.setdefault(storage, []).append(node)
        if fact.unknown or fact.sync:
            found |= {previous} if previous is not None else set()
            previous = node
        if fact.barrier:
            found.update(barrier)
            barrier = [node]
        elif node.op not in ("placeholder", "get_attr"):
            found.update(barrier[:1] if barrier and facts[barrier[0]].barrier else ())
            barrier.append(node)
        found.discard(node)
        deps[node] = found
    return deps


def random_chain(facts: Mapping[fx.Node, NodeFacts]) -> dict[fx.Node, set[fx.Node]]:
    """Each random node after the random node before it."""
    chain: dict[fx.Node, set[fx.Node]] = {node: set() for node in facts}
    previous: fx.Node | None = None
    for node, fact in facts.items():
        if fact.random:
            if previous is not None:
                chain[node].add(previous)
            previous = node
    return chain
