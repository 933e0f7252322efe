"""Counters that a forward only moves on, such as BatchNorm's count of batches: all in one op before everything else.

Each is one more kernel in the way of its branch, and one more tensor for a worker to hand back. Behind everything else
they would be lost where checkpointing ends a forward early, which it computes a second time.
"""

from __future__ import annotations

import torch
from torch import fx

Kind = tuple[torch.device, torch.dtype, int]


def gather_counters(gm: fx.GraphModule) -> None:
    """Have the graph start with adding to its counters, which nothing else in it reads: to those alike in one op."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    found: dict[Kind, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_method", target="add_"):
        kind = _kind(node)
        if kind is not None:
            found.setdefault(kind, []).append(node)
    for (_, _, step), nodes in found.items():
        if len(nodes) > 1:
            with gm.graph.inserting_after(placeholders[-1]):
                gm.graph.call_function(torch._foreach_add_, ([node.args[0] for node in nodes], step))
            for node in nodes:
                gm.graph.erase_node(node)
    gm.recompile()


def _kind(node: fx.Node) -> Kind | None:
    """What counters have in common that one op moves on; None where it is no such counter."""
    counter, *steps = node.args
    if node.users or node.kwargs or len(steps) != 1 or type(steps[0]) is not int or not isinstance(counter, fx.Node):
        return None
    value = counter.meta.get("example_value")
    is_own = counter.op == "placeholder" and len(counter.users) == 1 and "tensor_dict" in counter.meta
    if not is_own or not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dim():
        return None
    return value.device, value.dtype, steps[0]
