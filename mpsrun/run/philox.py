"""Random numbers on a GPU: each random op of a region draws where it would have drawn in the plain script.

A CUDA generator is a seed and an offset into a Philox sequence, and every random kernel moves the offset by an amount
that depends on its shapes alone. So the lead knows beforehand where each op of a region draws, whoever runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from mpsrun.wire.messages import Rng

if TYPE_CHECKING:
    from mpsrun.run.crossing import Crossing


class Started(Protocol):
    """An execution of a region that knows where its random numbers start."""

    random_start: int


def generator() -> torch.Generator:
    """The default generator of the current GPU."""
    return torch.cuda.default_generators[torch.cuda.current_device()]


def offset() -> int:
    """Where the default generator stands."""
    return generator().get_offset()


def reserve(crossing: Crossing) -> tuple[tuple[Rng, ...], int]:
    """The place of each share's random ops, and where the region starts; steps over all that the region draws.

    No places where nothing is random.
    """
    if not crossing.random:
        return (), 0
    source = generator()
    start = source.get_offset()
    source.set_offset(start + crossing.random_total)
    seed = source.initial_seed()
    return tuple(Rng(seed, tuple(start + span for span in share.spans)) for share in crossing.shares), start


def seek(handle: tuple[Started, object], distance: int) -> None:
    """Put the generator at a distance from where the region of `handle` started."""
    generator().set_offset(handle[0].random_start + distance)


@contextlib.contextmanager
def replayed(rng: Rng | None) -> Iterator[Callable[[int], None] | None]:
    """Run random ops at the places they had; yields what to call before each, by its number. Restores the generator."""
    if rng is None:
        yield None
        return
    source = generator()
    before = source.get_state()
    if source.initial_seed() != rng.seed:
        source.manual_seed(rng.seed)

    def place(ordinal: int) -> None:
        source.set_offset(rng.offsets[ordinal])

    try:
        yield place
    finally:
        source.set_state(before)


@contextlib.contextmanager
def undisturbed(kind: str) -> Iterator[None]:
    """Put the generator back where it was, for a thread that draws in the lead's name.

    What the script itself draws meanwhile, from another thread, is not kept apart.
    """
    if kind != "cuda":
        yield
        return
    source = generator()
    before = source.get_state()
    try:
        yield
    finally:
        source.set_state(before)
