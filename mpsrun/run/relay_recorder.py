"""Recordings of a graph with regions on worker lanes: what lead and workers replay together.

In the place of the recorder of the lead's device: it has the workers record their parts, too, and has each replay
released and waited for. See docs/decisions.md, "Captured worker lanes".
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mpsrun import log
from mpsrun.errors import MpsrunError, NotNow, in_a_line
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing, Gathering, Handed, Invocation
from mpsrun.run.link import Work
from mpsrun.run.recorder import Function, Recorder, Recording
from mpsrun.run.relay import Relay, Step, entered
from mpsrun.run.specialize import Strand
from mpsrun.wire import messages as m


class RelayRecorder:
    """Makes the recordings of one lowered graph; `strands` in the order in which it forks into them."""

    has_workers = True

    def __init__(self, inner: Recorder, strands: Sequence[Strand]) -> None:
        self._inner, self._strands = inner, strands
        self._owner = strands[0].crossing.owner
        self._known: object = None
        self._era: object = None

    @property
    def era(self) -> object:
        """The processes that take part and what they are bound to; like no other while one of them is not ready."""
        known = self._inner.era, self._owner.stirs
        if known != self._known:
            crossings = [strand.crossing for strand in self._strands]
            if not all(crossing.is_open() for crossing in crossings):
                return object()
            shares = [share for crossing in crossings for share in crossing.shares]
            self._known = known
            self._era = self._inner.era, *((share.link.done, share.job, share.binds) for share in shares)
        return self._era

    def make_room(self) -> None:
        """As for the lead alone; a worker sees to itself."""
        self._inner.make_room()

    def follow(self) -> None:
        """As for the lead alone: it writes what its own recordings read."""
        self._inner.follow()

    def record(self, function: Function, forward: Recording | None = None) -> Recording:
        """Record a forward, or the backward of `forward`.

        Raises whatever keeps it from being recorded, in lead or workers, and `NotNow` where a worker is missing.
        """
        if isinstance(forward, _Forward):
            return _Backward(self._inner, forward, function)
        return _Forward(self._inner, [strand.crossing for strand in self._strands], function)


class _Forward:
    """A recorded forward: its slots, one execution of each crossing, and its relay; recording: of the lead's part."""

    def __init__(self, inner: Recorder, crossings: Sequence[Crossing], function: Function) -> None:
        self.owner = crossings[0].owner
        self._invocations: dict[Crossing, Invocation] = {}
        self._is_recorded = False
        with self.owner.lock:
            if not all(crossing.is_open() for crossing in crossings):
                raise NotNow("a worker is missing")
            steps = [self._step(number, crossing) for number, crossing in enumerate(crossings, start=1)]
        relay = self._relay = Relay(self.owner, steps)
        for invocation in self._invocations.values():
            invocation.relay = relay
        self.owner.record(relay)

        def run() -> Any:
            with entered(self), relay.running():
                return function()

        self.recording = inner.record(run)
        self.owner.wait_recorded(relay)
        self._is_recorded = True

    def _step(self, number: int, crossing: Crossing) -> Step:
        invocation = self._invocations[crossing] = Invocation(crossing, ())
        room = invocation.room = self.owner.take(crossing.forward_bytes)
        invocation.joined = True  # a slot that is given back is not written any more: each replay waits for its end
        slot = m.Slot(room.chunk.id, room.offset_bytes)
        message = m.Forward(number, invocation.id, crossing.layout, slot, invocation.state, None, ())
        invocation.forward = Handed(message, tuple(share.statics for share in crossing.shares))
        return Step(crossing, crossing.links, room, Work(message, invocation.forward, crossing, 0.0))

    def replay(self) -> Any:
        """Replay it in lead and workers."""
        return self.owner.replay(self._relay, self.recording.replay)

    def invocation(self, crossing: Crossing, args: tuple[Any, ...]) -> Invocation:
        """The one execution of a crossing, which is done again in each replay."""
        invocation = self._invocations.get(crossing)
        if invocation is None:
            raise RuntimeError("expected a region that takes part in the recording, found another one")
        if not self._is_recorded and not all(share.is_bound_to(args) for share in crossing.shares):
            raise NotNow("another thread has bound another network of its kind")
        invocation.args = args
        return invocation

    def noting(self, function: Function) -> tuple[Any, list[tuple[Invocation, Gathering]]]:
        """Run a backward as it is; returns its result, and what it came to in which order."""
        noted: list[tuple[Invocation, Gathering]] = []
        for invocation in self._invocations.values():
            invocation.noted = noted
        try:
            return function(), noted
        finally:
            for invocation in self._invocations.values():
                invocation.noted = None


class _Backward:
    """A backward of a recorded forward: the first replay runs as it is and takes notes, from which it is recorded."""

    def __init__(self, inner: Recorder, forward: _Forward, function: Function) -> None:
        self._inner, self._forward, self._function = inner, forward, function
        self._noted: list[tuple[Invocation, Gathering]] | None = None
        self._is_settled = False

    def replay(self) -> Any:
        """Replay it in lead and workers if it is recorded, else compute it."""
        if self._noted is None:
            result, self._noted = self._forward.noting(self._function)
            return result
        if not self._is_settled:
            self._is_settled = True
            try:
                self._function = self._recorded(self._function, self._noted)
            except NotNow:
                self._is_settled = False
            except (RuntimeError, MpsrunError) as error:
                log.say(f"a backward pass cannot be captured, it runs uncaptured ({in_a_line(error)})")
        return self._function()

    def _recorded(self, function: Function, noted: Sequence[tuple[Invocation, Gathering]]) -> Function:
        """What replays it; keeps neither `function` nor this object."""
        owner = self._forward.owner
        owner.read_flags_in_backward()
        relay = Relay(owner, _steps(owner, noted))
        owner.record(relay)

        def run() -> Any:
            for invocation, _ in noted:
                invocation.backward_relay = relay
            try:
                with relay.running():
                    return function()
            finally:
                for invocation, _ in noted:
                    invocation.backward_relay = None

        recording = self._inner.record(run, self._forward.recording)
        owner.wait_recorded(relay)
        return (lambda: owner.replay(relay, recording.replay)) if relay.links else recording.replay


def _steps(owner: Coordinator, noted: Sequence[tuple[Invocation, Gathering]]) -> list[Step]:
    """The steps of a backward, with slots of their own."""
    steps = []
    with owner.lock, contextlib.ExitStack() as undo:
        for number, (invocation, gathering) in enumerate(noted, start=1):
            crossing, forward = invocation.crossing, invocation.forward
            if forward is None:
                raise RuntimeError("mpsrun: a backward without its forward")
            room = owner.take(crossing.backward_bytes)
            undo.callback(owner.retire, room, invocation.stream, ())
            slot = m.Slot(room.chunk.id, room.offset_bytes)
            message = m.Backward(number, invocation.id, crossing.layout, slot, gathering.tasks, True, None)
            work = Work(message, forward, crossing, 0.0)
            steps.append(Step(crossing, gathering.links, room, work, gathering))
        undo.pop_all()
    return steps
