"""Captured lanes: a lowered graph that is recorded once and replayed, its branches on side streams.

A call copies the inputs to where the recording reads them, replays, and returns copies of what it wrote. Parameters and
buffers are read and written where they are. Backward is recorded when the script first asks for it, once for each
combination of outputs that has gradients. The first call under given settings runs as it is, so that whatever is set up
at first use is there.

A recording holds the activations of one call. While that one's backward may still come, another call has another
recording, as where an encoder is called for two views before the backward of both.

Once many steps in a row were alike, and asked for nothing more than plain PyTorch's memory holds, the graph is recorded
anew with thrift, and once more with its memory packed, whose sizes are known then. A script that asks for more after
that gets a recording without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from mpsrun import log
from mpsrun.errors import NotNow, NotShippable, in_a_line
from mpsrun.graph.state import State
from mpsrun.run import state as modes
from mpsrun.run.packing import Packing
from mpsrun.run.recorder import Recorder, was_ended
from mpsrun.run.replay import Body, Settings, Thrift
from mpsrun.run.subject import Subject
from mpsrun.wire.messages import Flags

# Whoever moves parameters or changes settings more often than this is served better without recordings.
MOST_RECORDINGS = 4
# More than the tuner takes with one plan, so that it does not time a recording.
STEPS_BEFORE_THRIFT = 32
# Each of them keeps the activations of a call or more.
MOST_RECORDED = 8
NO_THRIFT = Thrift(frees=False, lends=False)
MOST_AT_ONCE = 4  # calls whose backward is yet to come
MOST_ENDED = 3  # recordings that another thread of the script ends, before there are no more
MOST_IDLE = 64  # replays of others, after which a recording is dropped: calls do not overlap any more


class Captured:
    """A lowered graph, called like `run`, with which it starts and to which it goes back where it must.

    replays: how many calls were replayed. thrift: what is recorded with. failure: why it will never be recorded again,
    if so.
    """

    def __init__(self, subject: Subject, run: Callable[..., Any], recorder: Recorder) -> None:
        self.replays = 0
        self.thrift = NO_THRIFT
        self.failure: Exception | None = None
        self._subject, self._run, self._recorder = subject, run, recorder
        self._may_save = not recorder.has_workers
        self._may_lend = True
        self._packing: Packing | None = None  # of recordings under these settings:
        self._packed_under: tuple[Flags, State] | None = None
        self._may_pack = True
        self._most = 1 if recorder.has_workers else MOST_AT_ONCE
        self._bodies: list[Body] = []
        self._ended = 0  # how many recordings another thread ended
        self._moves = 0  # how often recordings were dropped since something was not as they need it
        self._settings: Settings | None = None  # those of the last call that ran as it is
        self._bumps: dict[int, int] = {}  # by argument, how many versions it gains in a call
        self._lock = threading.Lock()  # two threads cannot have their activations in one place

    def __call__(self, *args: Any) -> Any:
        if not self._lock.acquire(blocking=False):
            return self._run(*args)
        try:
            body = self._body_for(args)
            if body is None:
                return self._run_as_it_is(args)
            self.replays += 1
            return body.call(args)
        finally:
            self._lock.release()

    def _body_for(self, args: tuple[Any, ...]) -> Body | None:
        """The recording to replay; None where the call runs as it is."""
        was_packed = self._drop_failed()
        settings = modes.flags(), modes.ambient(self._subject.kind), self._recorder.era
        free = [body for body in self._bodies if not body.is_busy]
        busy = len(self._bodies) - len(free)
        body = next((body for body in free if body.settings == settings and body.fits(args)), None)
        if body is not None and not self._changes_thrift(body):
            return self._used(body)
        stale = free if body is None else [body]
        moves = body is None and bool(stale) and not self._are_merely_old(stale, args, settings)
        if moves and self._moves == MOST_RECORDINGS - 1:
            times = f"it was recorded {MOST_RECORDINGS} times, as parameters moved, or settings or workers changed"
            self._give_up(NotShippable(times))
        if busy >= self._most:
            return None
        if settings != self._settings:
            self._settings = settings
            return None
        self._moves += moves
        self._bodies = [body for body in self._bodies if body not in stale]
        # What is not in the place of another has to show that it may.
        thrift = self.thrift if stale or was_packed else NO_THRIFT
        del body, free, stale  # their memory is free for the next one
        return self._recorded(args, settings, thrift)

    def _drop_failed(self) -> bool:
        """Recordings whose backward could not be recorded do not serve again: others may, or one without thrift.

        Returns whether one of them was packed, which says nothing against thrift.
        """
        was_packed = False
        for body, error in [(body, body.failed) for body in self._bodies if body.failed is not None]:
            self._bodies.remove(body)
            was_packed |= body.is_packed
            self._fail(body.thrift, body.is_packed, error)
        return was_packed

    def _are_merely_old(self, stale: Sequence[Body], args: tuple[Any, ...], settings: Settings) -> bool:
        """Whether one of these would serve, had the recording of another graph on the device not failed since."""
        if self._recorder.has_workers:
            return False
        return any(body.settings[:2] == settings[:2] and body.fits(args) for body in stale)

    def _recorded(self, args: tuple[Any, ...], settings: Settings, thrift: Thrift) -> Body | None:
        packing = self._packing if thrift.frees and settings[:2] == self._packed_under else None
        body: Body | None
        try:
            self._subject.recorded.add(self)
            if len(self._subject.recorded) > MOST_RECORDED:
                raise NotShippable(f"{MOST_RECORDED} others of this graph are, for other sizes, modes and plans")
            body = Body(self._subject, self._run, args, self._recorder, self._bumps, settings, packing, thrift)
        except NotNow:
            return None
        except (RuntimeError, NotShippable) as error:
            self._fail(thrift, packing is not None, error)
            body = None  # what it had is given back with the error
        if body is None:
            goes_on = packing is not None and not self._may_pack
            return self._recorded(args, (*settings[:2], self._recorder.era), thrift) if goes_on else None
        if self._recorder.era != settings[2]:  # another thread may have changed it
            return None
        self._bodies.append(body)
        return self._used(body)

    def _used(self, body: Body) -> Body:
        body.used = self.replays
        if len(self._bodies) > 1:
            self._bodies = [b for b in self._bodies if b.is_busy or self.replays - b.used <= MOST_IDLE]
        return body

    def _changes_thrift(self, body: Body) -> bool:
        """Whether a recording with more or less thrift is to take the place of this one; asked before each forward."""
        if body.outgrown:
            self._spend()
        elif self._may_save and not body.thrift.frees and body.regular >= STEPS_BEFORE_THRIFT:
            self.thrift = Thrift(True, self._may_lend)
        elif not body.is_free():
            self._may_lend = False
            self.thrift = Thrift(True, False)
        elif body.thrift.frees and not body.is_packed and self._may_pack and body.packing.is_known:
            self._packing, self._packed_under = body.packing, body.settings[:2]
        else:
            return False
        return True

    def _fail(self, thrift: Thrift, was_packed: bool, error: Exception) -> None:
        """What was not recorded is not tried again in this way: not with thrift, not beside those that there are."""
        if was_ended(error) and self._ended < MOST_ENDED:
            self._ended += 1
        elif was_packed:
            self._may_pack, self._packing = False, None
        elif thrift.frees:
            self._spend()
        elif self._bodies:
            self._most = len(self._bodies)
        else:
            self._give_up(error)

    def _spend(self) -> None:
        """No thrift any more."""
        self._may_save, self.thrift = False, NO_THRIFT

    def _give_up(self, error: Exception) -> None:
        self._bodies, self._most, self.failure = [], 0, error.with_traceback(None)
        self._subject.recorded.discard(self)
        log.say(f"a network cannot be captured, it runs uncaptured ({in_a_line(error)})")

    def _run_as_it_is(self, args: tuple[Any, ...]) -> Any:
        statics = self._subject.statics
        before = {i: args[i]._version for i in statics if not args[i].is_inference()}
        result = self._run(*args)
        self._bumps = {i: args[i]._version - version for i, version in before.items() if args[i]._version > version}
        return result
