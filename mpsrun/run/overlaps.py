"""Whether inputs share memory in a way that the graph was not compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mpsrun.graph.effects import Effects


class Overlaps:
    """Watches the inputs of a graph that writes to some of them in place.

    Regions are found on the assumption that inputs which were apart stay apart. Dynamo guards on tensors that are the
    same object, not on two that happen to lie over each other, as slices of one array do.
    """

    def __init__(self, gm: fx.GraphModule, effects: Effects) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        written = frozenset().union(*(facts.writes for facts in effects.facts.values()))
        inputs = [(i, node) for i, node in enumerate(placeholders) if effects.placeholder_kind[node] == "input"]
        self._written = [i for i, node in inputs if effects.facts[node].outputs & written]
        self._others = [i for i, _ in inputs]
        self._known = {
            (i, j)
            for i, a in inputs
            for j, b in inputs
            if i != j and effects.facts[a].outputs & effects.facts[b].outputs
        }

    def now(self, args: Sequence[Any]) -> bool:
        """Whether an input that is written lies over another one, unlike when the graph was compiled."""
        return any(
            _overlap(args[i], args[j])
            for i in self._written
            for j in self._others
            if i != j and (i, j) not in self._known
        )


def _overlap(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not a.numel() or not b.numel():
        return False
    first, second = _span(a), _span(b)
    return first[0] < second[1] and second[0] < first[1]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one after the last."""
    start = tensor.data_ptr()
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()
