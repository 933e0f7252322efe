"""Copies of a recording's gradients in memory that the script may keep.

The same gradients leave in every step, and there may be hundreds. So their places are worked out once. Small ones are
gathered by the recording itself, where a launch costs the lead nothing, and then leave in one copy. To copy large ones
twice would cost the GPU more than a launch costs the lead.

    recording:  gradients -> gather -> small ones side by side, large ones as they are
    each step:  one allocation, one copy of the small ones, one launch or a few for the large ones, a tensor for each
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpsrun.run.layout import TensorMeta, is_dense

LARGE_BYTES = 1 << 18
ALIGN_BYTES = 16  # as much as the kernels of optimizers read at once

Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Gathered:
    """What the recording of a backward pass leaves. rows: by dtype, the small gradients and the large ones."""

    rows: tuple[tuple[torch.Tensor, list[torch.Tensor]], ...]
    singles: tuple[torch.Tensor, ...]


class Keeper:
    """Copies gradients that are in each step like those it was made for."""

    def __init__(self, gradients: Gradients) -> None:
        places: dict[torch.dtype, list[int]] = {}
        self._singles: list[int] = []
        for i, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout is torch.strided and is_dense(TensorMeta.of(gradient)):
                places.setdefault(gradient.dtype, []).append(i)
            elif gradient is not None:
                self._singles.append(i)
        self._rows = [_Row(own, gradients) for own in places.values()]
        order = [*(i for row in self._rows for i in row.places), *self._singles]
        position = {place: i for i, place in enumerate(order)}
        self._positions = [position.get(i, len(order)) for i in range(len(gradients))]

    def gather(self, gradients: Gradients) -> Gathered:
        """What is to be recorded behind a backward pass."""
        singles = tuple(gradient for i in self._singles if (gradient := gradients[i]) is not None)
        return Gathered(tuple(row.gather(gradients) for row in self._rows), singles)

    def copies(self, gathered: Gathered) -> list[torch.Tensor | None]:
        """The gradients in memory that nobody writes again."""
        made: list[torch.Tensor | None] = []
        for row, (small, large) in zip(self._rows, gathered.rows, strict=True):
            made += row.copies(small, large)
        made += [single.clone() for single in gathered.singles]
        made.append(None)
        return [made[i] for i in self._positions]


class _Row:
    """The dense gradients of one dtype side by side, strides as they are: vectors, other small ones, large ones."""

    def __init__(self, places: Sequence[int], gradients: Gradients) -> None:
        given: dict[int, Any] = {i: gradients[i] for i in places}
        step = max(1, ALIGN_BYTES // given[places[0]].element_size())
        large = [i for i in places if given[i].nbytes >= LARGE_BYTES]
        vectors = [i for i in places if i not in large and given[i].dim() == 1 and given[i].numel() % step == 0]
        others = [i for i in places if i not in large and i not in vectors]
        self.places = [*vectors, *others, *large]
        self._small = len(vectors) + len(others)
        self._vectors = [given[i].numel() for i in vectors]
        ordered = [given[i] for i in self.places]
        room = [-(-gradient.numel() // step) * step for gradient in ordered]
        starts = [*itertools.accumulate(room, initial=0)]
        self._vectors_size, self._small_size, self._size = starts[len(vectors)], starts[self._small], starts[-1]
        self._shaped = [
            (tuple(gradient.shape), gradient.stride(), start)
            for gradient, start in zip(ordered[len(vectors) :], starts[len(vectors) :], strict=False)
        ]

    def gather(self, gradients: Gradients) -> tuple[torch.Tensor, list[torch.Tensor]]:
        given: list[Any] = [gradients[i] for i in self.places]
        together = given[0].new_empty(self._small_size)
        if self._small:
            torch._foreach_copy_(self._parts(together, self._small), given[: self._small])
        return together, given[self._small :]

    def copies(self, small: torch.Tensor, large: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = small.new_empty(self._size)
        parts = self._parts(whole, len(self.places))
        _reinterpret(whole, (self._small_size,), (1,), 0).copy_(small)
        if large:
            torch._foreach_copy_(parts[self._small :], large)
        return parts

    def _parts(self, whole: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The first `count` gradients in this memory."""
        start = _reinterpret(whole, (self._vectors_size,), (1,), 0)
        vectors = torch.unsafe_split_with_sizes(start, self._vectors)
        return [*vectors, *[_reinterpret(whole, *place) for place in self._shaped[: count - len(vectors)]]]


# Views would take twice as long to make, and share their versions.
_reinterpret: Any = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
