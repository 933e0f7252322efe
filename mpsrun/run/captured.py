"""Captured lanes: a lowered graph that is recorded once and replayed, its branches on side streams.

A call copies the inputs to where the recording reads them, replays, and returns copies of what it wrote. Parameters and
buffers are read and written where they are. Backward is recorded when the script first asks for it, once for each
combination of outputs that has gradients. The first call under given settings runs as it is, so that whatever is set up
at first use is there.

A recording holds the activations of one call. While that one's backward may still come, another call runs without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mpsrun import log
from mpsrun.errors import NotNow, NotShippable
from mpsrun.run import state as modes
from mpsrun.run.recorder import Recorder
from mpsrun.run.replay import Body, Settings, Subject, Thrift

# Whoever moves parameters or changes settings more often than this is served better without recordings.
MOST_RECORDINGS = 4
# Each of them keeps the activations of a call.
MOST_RECORDED = 8


class Captured:
    """A lowered graph, called like `run`, with which it starts and to which it goes back where it must.

    replays: how many calls were replayed.
    """

    def __init__(self, subject: Subject, run: Callable[..., Any], recorder: Recorder) -> None:
        self.replays = 0
        self._subject, self._run, self._recorder = subject, run, recorder
        self._thrift = Thrift(frees=recorder.may_free, lends=True)
        self._body: Body | None = None
        self._recordings = 0
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
        if self._body is not None and self._body.failed is not None and not self._body.is_busy:
            self._give_up(self._body.failed)
        if self._body is not None and self._body.outgrown and not self._body.is_busy:
            self._body, self._thrift = None, self._thrift._replace(frees=False)
        body, settings = self._body, (modes.flags(), modes.ambient(self._subject.kind), self._recorder.era)
        if body is not None and body.settings == settings and body.fits(args):
            if body.is_busy:
                return None
            if body.is_free():
                return body
            self._thrift = self._thrift._replace(lends=False)
        if self._recordings >= MOST_RECORDINGS and body is not None and not body.is_busy:
            times = f"it was recorded {MOST_RECORDINGS} times, as parameters moved, or settings or workers changed"
            self._give_up(NotShippable(times))
        if self._recordings >= MOST_RECORDINGS or settings != self._settings:
            self._settings = settings
            return None
        if body is not None and body.is_busy:
            return None
        body = self._body = None  # its memory is free for the next one
        self._recordings += 1
        try:
            self._subject.recorded.add(self)
            if len(self._subject.recorded) > MOST_RECORDED:
                raise NotShippable(f"{MOST_RECORDED} others of this graph are, for other sizes, modes and plans")
            body = Body(self._subject, self._run, args, self._recorder, self._bumps, settings, self._thrift)
            self._body = body if self._recorder.era == settings[2] else None  # another thread may have changed it
        except NotNow:
            self._recordings -= 1
        except (RuntimeError, NotShippable) as error:
            self._give_up(error)
        return self._body

    def _give_up(self, error: Exception) -> None:
        self._body, self._recordings = None, MOST_RECORDINGS
        self._subject.recorded.discard(self)
        reason = str(error).strip().partition("\n")[0]
        log.say(f"a network cannot be captured, it runs uncaptured ({type(error).__name__}: {reason})")

    def _run_as_it_is(self, args: tuple[Any, ...]) -> Any:
        statics = self._subject.statics
        before = {i: args[i]._version for i in statics if not args[i].is_inference()}
        result = self._run(*args)
        self._bumps = {i: args[i]._version - version for i, version in before.items() if args[i]._version > version}
        return result
