"""Relays: a forward or a backward that lead and workers replay together, its crossings as steps numbered from 1.

How the steps are kept in order is told in docs/decisions.md, "Captured worker lanes".
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mpsrun.device.arena import Room
from mpsrun.errors import NotNow, NotShippable
from mpsrun.run.link import STEP, SUBMITTED, Link, Work

if TYPE_CHECKING:
    from mpsrun.run.coordinator import Coordinator
    from mpsrun.run.crossing import Crossing, Gathering, Invocation

_numbers = itertools.count(1)
_local = threading.local()


class Step(NamedTuple):
    """A crossing in a relay, and its slot; gathering: that of a backward."""

    crossing: Crossing
    links: tuple[Link, ...]
    room: Room
    work: Work
    gathering: Gathering | None = None


class Relay:
    """Steps in the order in which the lead comes to them, and the counters by which it is kept.

    done: of each worker, the counter that says that a replay is over. reset: what is set before each replay; the last
    of these counters releases it.
    """

    def __init__(self, owner: Coordinator, steps: Sequence[Step]) -> None:
        self.owner, self.steps, self.number = owner, tuple(steps), next(_numbers)
        self.links = tuple(dict.fromkeys(link for step in steps for link in step.links))
        self.done = tuple(link.done for link in self.links)
        self.reset = (STEP, *(link.progress for link in self.links), SUBMITTED)
        self._numbers = {step.crossing: number for number, step in enumerate(steps, start=1)}
        self._works = {link: tuple(step.work for step in steps if link in step.links) for link in self.links}
        self._stream = owner.device.stream_key()
        self._released = 0

    def of(self, link: Link) -> tuple[Work, ...]:
        """The steps of one worker."""
        return self._works[link]

    def is_recorded(self) -> bool:
        """Whether all workers have recorded their parts.

        Raises `NotShippable` with the reason of one that could not, and `NotNow` where one was lost.
        """
        if any(link.lost is not None for link in self.links):
            raise NotNow("a worker was lost")
        waiting = [link for link in self.links if self.number not in link.recorded]
        for link in self.links:
            if reason := link.recorded.get(self.number):
                raise NotShippable(f"in worker {link.index}: {reason}")
        return not waiting

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The lead's own part runs inside. Raises `RuntimeError` where it comes to other steps, or in another order."""
        self._released = 0
        yield
        self._expect(len(self.steps), self._released)

    def release(self, crossing: Crossing) -> None:
        """The slot of a step is filled: its workers may start."""
        number = self._numbers.get(crossing, 0)
        self._expect(self._released + 1, number)
        self._released = number
        self.owner.device.signal((STEP,), (number,))

    def wait(self, crossing: Crossing) -> None:
        """Wait until all workers of a step have finished it."""
        number = self._numbers[crossing]
        counters = [link.progress for link in self.steps[number - 1].links]
        self.owner.pool.wait(counters, [number] * len(counters))

    def room(self, crossing: Crossing, gathering: Gathering) -> Room:
        """The slot of a backward. Raises `RuntimeError` where other outputs have gradients than were expected."""
        number = self._numbers.get(crossing, 0)
        if not number or self.steps[number - 1].gathering is not gathering:
            raise RuntimeError("a backward pass does not come to the regions to which the one before it came")
        return self.steps[number - 1].room

    def _expect(self, number: int, found: int) -> None:
        if number != found:
            raise RuntimeError(f"expected to come to step {number} of {len(self.steps)}, found {found}")

    def __del__(self) -> None:
        self.owner.garbage.discard(self.links, self.number)
        for step in self.steps:
            if step.gathering is not None:  # a forward's slots are its invocations'
                self.owner.retire(step.room, self._stream, ())


class Forward(Protocol):
    """A forward in a relay that runs in the present thread."""

    def invocation(self, crossing: Crossing, args: tuple[Any, ...]) -> Invocation:
        """The execution of a crossing with these arguments."""


@contextlib.contextmanager
def entered(forward: Forward) -> Iterator[None]:
    """What this thread forks inside of the body are steps of this forward."""
    _local.forward = forward
    try:
        yield
    finally:
        _local.forward = None


def current() -> Forward | None:
    """The forward whose steps this thread is at, if any."""
    return getattr(_local, "forward", None)
