"""Which whole numbers among the inputs of a graph its regions depend on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from mpsrun.graph.effects import Effects


def sizes_of(gm: fx.GraphModule, effects: Effects, needed: Iterable[fx.Node]) -> tuple[int, ...]:
    """Positions of the inputs that decide about the shapes, or are among the values, of `needed`.

    Other numbers, as a count of steps, change from call to call and need nothing to be prepared anew.
    """
    values = [effects.values.get(node, node.meta.get("example_value")) for node in needed]
    symbols = frozenset().union(*(_symbols(leaf) for leaf in tree_leaves(values)))
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    numbers = [(i, x) for i, x in enumerate(inputs) if isinstance(x, int | torch.SymInt)]
    return tuple(i for i, x in numbers if isinstance(x, int) or _symbols(x) & symbols)


def _symbols(value: Any) -> frozenset[Any]:
    if isinstance(value, torch.SymInt):
        return frozenset(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return frozenset().union(*(_symbols(size) for size in (*value.shape, *value.stride(), value.storage_offset())))
    return frozenset()
