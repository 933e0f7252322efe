"""A recording's gradients in memory that the script may keep.

The same gradients leave in every step, and there may be hundreds. So their places are worked out once. Small ones are
gathered by the recording itself, where a launch costs the lead nothing, and then leave in one copy. To copy large ones
twice would cost the GPU more than a launch costs the lead.

    recording:  gradients -> gather -> small ones side by side, large ones as they are
    each step:  one allocation, one copy of the small ones, one launch or a few for the large ones, a tensor for each

From a script that drops its gradients before the next forward, large ones are not copied any more after a few steps but
lent: handed out where the recording has written them. Before each forward it is looked at whether they are back.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mpsrun.run.layout import TensorMeta, is_dense

LARGE_BYTES = 1 << 18
ALIGN_BYTES = 16  # as much as the kernels of optimizers read at once
STEPS_BEFORE_LENDING = 4  # in a row, whose gradients were gone before the next forward

Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Gathered:
    """What the recording of a backward pass leaves. rows: by dtype, the small gradients and the large ones."""

    rows: tuple[tuple[torch.Tensor, list[torch.Tensor]], ...]
    singles: tuple[torch.Tensor, ...]


class Keeper:
    """Hands out gradients that are in each step like those it was made for.

    lends: whether it may lend them, those that share no memory with each other and with `others`.
    """

    def __init__(self, gradients: Gradients, lends: bool = False, others: Iterable[torch.Tensor] = ()) -> None:
        places: dict[torch.dtype, list[int]] = {}
        self._singles: list[int] = []
        for i, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout is torch.strided and is_dense(TensorMeta.of(gradient)):
                places.setdefault(gradient.dtype, []).append(i)
            elif gradient is not None:
                self._singles.append(i)
        addresses = Counter(map(_address, (*(g for g in gradients if g is not None), *others))) if lends else Counter()
        self._rows = [_Row(own, gradients, addresses) for own in places.values()]
        order = [*(i for row in self._rows for i in row.places), *self._singles]
        position = {place: i for i, place in enumerate(order)}
        self._positions = [position.get(i, len(order)) for i in range(len(gradients))]
        self._may_lend = any(row.loans for row in self._rows)
        self._steps = 0
        self._copies: list[StorageWeakRef] = []
        self._lender: Gathered | None = None
        self._lent: list[tuple[StorageWeakRef, int]] = []  # and how many references are our own

    def gather(self, gradients: Gradients) -> Gathered:
        """What is to be recorded behind a backward pass."""
        singles = tuple(gradient for i in self._singles if (gradient := gradients[i]) is not None)
        return Gathered(tuple(row.gather(gradients) for row in self._rows), singles)

    def hand_out(self, gathered: Gathered) -> list[torch.Tensor | None]:
        """The gradients in memory that nobody writes again, as long as `are_back` is asked before the next replay."""
        lends = self._may_lend and self._steps >= STEPS_BEFORE_LENDING
        if lends and gathered is not self._lender:
            self._lender = gathered
            self._lent = [_counted(lent) for row, (_, large) in self._each(gathered) for lent in row.lendable(large)]
        self._copies = []
        made: list[torch.Tensor | None] = []
        for row, (small, large) in self._each(gathered):
            whole, parts = row.hand_out(small, large, lends)
            made += parts
            if self._may_lend and not lends and row.loans:
                self._copies.append(StorageWeakRef(whole.untyped_storage()))
        made += [single.clone() for single in gathered.singles]
        made.append(None)
        return [made[i] for i in self._positions]

    def _each(self, gathered: Gathered) -> Iterable[tuple[_Row, tuple[torch.Tensor, list[torch.Tensor]]]]:
        return zip(self._rows, gathered.rows, strict=True)

    def are_back(self) -> bool:
        """Whether nobody has a gradient any more that was lent; to be asked once, before forward is replayed."""
        if self._copies:
            self._steps = self._steps + 1 if all(copy.expired() for copy in self._copies) else 0
            self._copies = []
        return all(_references(storage) == own for storage, own in self._lent)


def _counted(tensor: torch.Tensor) -> tuple[StorageWeakRef, int]:
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, _references(storage)


def _references(storage: StorageWeakRef) -> int:
    return torch._C._storage_Use_Count(storage.cdata)


def _address(tensor: torch.Tensor) -> int:
    """Of all that it shares with others, if it does; unlike any where it has no memory of that kind."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else -id(tensor)


class _Row:
    """The dense gradients of one dtype side by side, strides as they are: vectors, other small ones, large ones.

    loans: how many of the last are not copied where gradients are lent.
    """

    def __init__(self, places: Sequence[int], gradients: Gradients, addresses: Mapping[int, int]) -> None:
        """`addresses`: how many tensors lie in what may be lent."""
        given: dict[int, Any] = {i: gradients[i] for i in places}
        step = max(1, ALIGN_BYTES // given[places[0]].element_size())
        large = [i for i in places if given[i].nbytes >= LARGE_BYTES]
        vectors = [i for i in places if i not in large and given[i].dim() == 1 and given[i].numel() % step == 0]
        others = [i for i in places if i not in large and i not in vectors]
        own = [i for i in large if addresses.get(_address(given[i])) == 1]
        loans = [i for i in own if given[i].data_ptr() % ALIGN_BYTES == 0]
        self.loans = len(loans)
        self.places = [*vectors, *others, *(i for i in large if i not in loans), *loans]
        self._small = len(vectors) + len(others)
        self._vectors = [given[i].numel() for i in vectors]
        ordered = [given[i] for i in self.places]
        room = [-(-gradient.numel() // step) * step for gradient in ordered]
        self._starts = [*itertools.accumulate(room, initial=0)]
        starts = self._starts
        self._vectors_size, self._small_size = starts[len(vectors)], starts[self._small]
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

    def lendable(self, large: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of the large gradients that may be lent."""
        return large[len(large) - self.loans :]

    def hand_out(
        self, small: torch.Tensor, large: list[torch.Tensor], lends: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients, and the memory of those that are copied."""
        count = len(self.places) - self.loans * lends
        whole = small.new_empty(self._starts[count])
        parts = self._parts(whole, count)
        _reinterpret(whole, (self._small_size,), (1,), 0).copy_(small)
        if count > self._small:
            torch._foreach_copy_(parts[self._small :], large[: count - self._small])
        if lends:
            places = self._shaped[len(self._shaped) - self.loans :]
            lent = zip(self.lendable(large), places, strict=True)
            parts += [_reinterpret(gradient, shape, strides, 0) for gradient, (shape, strides, _) in lent]
        return whole, parts

    def _parts(self, whole: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The first `count` gradients in this memory."""
        start = _reinterpret(whole, (self._vectors_size,), (1,), 0)
        vectors = torch.unsafe_split_with_sizes(start, self._vectors)
        return [*vectors, *[_reinterpret(whole, *place) for place in self._shaped[: count - len(vectors)]]]


# Views would take twice as long to make, and share their versions.
_reinterpret: Any = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
