"""Which counters a forward only moves on, such as BatchNorm's of batches: nothing else in the graph reads them."""

from __future__ import annotations

import torch
from torch import fx

from mpsrun.graph.facts import Effects


def lone_counters(gm: fx.GraphModule, effects: Effects) -> frozenset[fx.Node]:
    """The nodes that add a number to a buffer which nothing else reads, and whose result nobody uses."""
    return frozenset(node for node in gm.graph.find_nodes(op="call_method", target="add_") if _is_lone(node, effects))


def _is_lone(node: fx.Node, effects: Effects) -> bool:
    counter, *steps = node.args
    if node.users or node.kwargs or [type(step) for step in steps] != [int] or not isinstance(counter, fx.Node):
        return False
    value = counter.meta.get("example_value")
    is_own = effects.placeholder_kind.get(counter) == "buffer" and len(counter.users) == 1
    if not is_own or not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dim():
        return False
    memory = effects.facts[counter].outputs
    others = (fact for other, fact in effects.facts.items() if other not in (node, counter))
    return not any((fact.reads | fact.writes | fact.outputs) & memory for fact in others)
