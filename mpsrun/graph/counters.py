"""Which counters a forward only moves on, such as BatchNorm's of batches: nothing else in the graph reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from mpsrun.graph.facts import Effects


def lone_counters(gm: fx.GraphModule, effects: Effects) -> frozenset[fx.Node]:
    """The nodes that add a number to a buffer which nothing else reads, and whose result nobody uses."""
    kinds = effects.placeholder_kind
    return frozenset(node for node in gm.graph.find_nodes(op="call_method", target="add_") if _is_lone(node, kinds))


def _is_lone(node: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    counter, *steps = node.args
    if node.users or node.kwargs or [type(step) for step in steps] != [int] or not isinstance(counter, fx.Node):
        return False
    value = counter.meta.get("example_value")
    is_own = kinds.get(counter) == "buffer" and len(counter.users) == 1
    return is_own and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dim()
