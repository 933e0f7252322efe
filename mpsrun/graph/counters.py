"""Which counters a forward only moves on, such as BatchNorm's of batches: nothing else in the graph reads them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from mpsrun.graph.facts import Effects


def lone_counters(gm: fx.GraphModule, effects: Effects) -> frozenset[fx.Node]:
    """The nodes that add a number to a buffer which nothing else reads, and whose result nobody uses."""
    facts = effects.facts
    met = Counter(s for fact in facts.values() for s in fact.reads | fact.writes | fact.outputs)
    added = [node for node in gm.graph.find_nodes(op="call_method", target="add_") if _is_counter(node, effects)]
    # the buffer itself has this memory, and the op that adds to it
    return frozenset(node for node in added if all(met[s] == 2 for s in facts[node].writes))


def _is_counter(node: fx.Node, effects: Effects) -> bool:
    counter, *steps = node.args
    if node.users or node.kwargs or [type(step) for step in steps] != [int] or not isinstance(counter, fx.Node):
        return False
    value = counter.meta.get("example_value")
    is_own = effects.placeholder_kind.get(counter) == "buffer" and len(counter.users) == 1
    return is_own and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dim()
