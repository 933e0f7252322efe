"""The lead's view of one worker: what it has been told, what it still owes, and whether it can be relied on."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mpsrun.device import ChunkHandle
from mpsrun.errors import MpsrunError
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

if TYPE_CHECKING:
    from mpsrun.run.crossing import Crossing, Handed

SEQUENCE_MASK = 0xFFFFFFFF
SUBMITTED = 0  # the counter with the last sequence number that the lead's streams have released to the workers
STEP = 1  # the counter with the last step of the present replay that the lead's stream has released


class Work(NamedTuple):
    """Work that was handed out to the workers of a crossing: enough for somebody else to do it."""

    message: m.Forward | m.Backward
    forward: Handed
    crossing: Crossing
    since_s: float

    @property
    def seq(self) -> int:
        return self.message.seq


@dataclass(eq=False)
class Replayed:
    """A replay of a relay, as one worker owes it: its steps, whose `seq` is the number of the step.

    stood_in: the last step that somebody else has done.
    """

    message: m.Replay
    steps: tuple[Work, ...]
    since_s: float
    stood_in: int = 0

    @property
    def seq(self) -> int:
        return self.message.seq

    def left(self, progress: int) -> tuple[Work, ...]:
        """The steps that are not done; `progress`: the worker's counter."""
        last = max(progress, self.stood_in)
        return tuple(step for step in self.steps if step.seq > last)


def reached(counter: int, value: int) -> bool:
    """Whether a 32-bit counter that wraps has come to a sequence number."""
    return (counter - value) & SEQUENCE_MASK < 0x80000000


class Link:
    """One worker process. Sends are ordered by the caller's lock.

    States: *coming* (no Ready yet), *up* (started), *lost* (what it owes is the stand-in's). There is no way back:
    a process that takes its place, of the next `generation`, has a link of its own. `is_last`: none will. `called`:
    whether it was told to start.
    `no_memory`: by layout, what the worker said where it had no memory for it. `recorded`: by relay, why it could not
    be recorded, None where it was.
    """

    def __init__(self, index: int, channel: LeadChannel, done: int, progress: int, generation: int = 0) -> None:
        self.index = index
        self.done = done  # the counter which says what this worker has done
        self.progress = progress  # the counter with the last step of a replay that it has finished
        self.generation = generation
        self.pid: int | None = None
        self.called = self.started = False
        self.lost: str | None = None
        self.is_last = False
        self.is_ended = False  # by the lead
        self.since_s = self.lost_s = time.monotonic()
        self.prepared: set[int] = set()
        self.no_memory: dict[int, str] = {}
        self.recorded: dict[int, str | None] = {}
        self.refused: set[int] = set()  # sequence numbers of work that the lead has to do
        self.owed: deque[Work | Replayed] = deque()
        self.last = 0  # the sequence number of its latest work
        self.counts: m.Counts | None = None
        self._channel = channel
        self._flags: m.Flags | None = None
        self._mapped: set[int] = set()
        self._pidfd: int | None = None
        self._moved_s = 0.0
        self._progress = 0  # in the replay under way
        self._asked: dict[int, float] = {}  # layouts under preparation, and since when
        self._compiling: set[int] = set()  # those of them whose jobs are compiled

    def ready(self, message: m.Ready) -> None:
        """The worker is there. Raises where it was there before, speaks another protocol or is gone already."""
        if self.lost is not None:
            raise MpsrunError(f"worker {self.index}: expected nothing more from it, found Ready from {message.pid}")
        if self.pid is not None:
            raise MpsrunError(f"worker {self.index}: expected to hear Ready once, found another from {message.pid}")
        if message.protocol != m.PROTOCOL:
            raise MpsrunError(f"worker {self.index}: expected protocol {m.PROTOCOL}, found {message.protocol}")
        try:
            self._pidfd = os.pidfd_open(message.pid)
        except (OSError, OverflowError) as error:
            raise MpsrunError(f"worker {self.index} (pid {message.pid}) ended before it started") from error
        self.pid = message.pid

    def has_started(self) -> None:
        """The worker has opened its device."""
        self.started = True
        self._moved_s = time.monotonic()

    def is_late(self, limit_s: float) -> bool:
        """Whether it has not come, or not started, within so many seconds."""
        awaited = not self.started if self.called else self.pid is None
        return awaited and time.monotonic() - self.since_s > limit_s

    def exited(self) -> bool:
        """Whether the process has ended."""
        if self._pidfd is None:
            return False
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def knows(self, flags: m.Flags) -> bool:
        """Whether the global settings are what this worker was told last."""
        return flags is self._flags

    def send(self, message: m.ToWorker) -> None:
        """Tell the worker something. A lost one is not told anything."""
        if self.lost is None:
            if isinstance(message, m.Prepare):
                self._asked[message.layout] = time.monotonic()
                self._compiling.update([message.layout] if message.compiled else ())
            self._channel.send(self.index, message)

    def answered(self, layout: int) -> bool:
        """Whether the worker has said what became of a layout."""
        return layout in self.prepared or layout in self.no_memory

    def has_prepared(self, layout: int) -> None:
        """The worker is ready for a layout."""
        self.prepared.add(layout)
        self._answer(layout)

    def lacks_memory(self, message: m.NoMemory) -> None:
        """The worker had no memory for a layout: it is not asked for it again, and what it refused is not its work."""
        self.no_memory.setdefault(message.layout, message.text)
        self.prepared.discard(message.layout)
        if message.seq:
            self.refused.add(message.seq)
        self._answer(message.layout)

    def _answer(self, layout: int) -> None:
        self._asked.pop(layout, None)
        self._compiling.discard(layout)
        self._moved_s = time.monotonic()

    @property
    def compiles(self) -> bool:
        """Whether the worker may be compiling, and does nothing else before that is done."""
        return bool(self._compiling) and self.lost is None

    def remember(self, work: Work | Replayed) -> None:
        """Note what is owed from now on, whether it can be sent or not."""
        self.last = work.message.seq
        self.owed.append(work)

    def send_step(self, message: m.Forward | m.Backward | m.Replay) -> None:
        """Send work that is remembered."""
        if self.lost is None:
            self._channel.send_step(self.index, message)
            if message.flags is not None:
                self._flags = message.flags

    def map_exports(self, wanted: dict[int, ChunkHandle]) -> None:
        """Have the worker map these exported chunks."""
        for chunk, handle in wanted.items():
            if chunk not in self._mapped:
                self._mapped.add(chunk)
                self.send(m.Map(handle))

    def unmap_exports(self, alive: set[int]) -> None:
        """Have the worker unmap the exported chunks that are no longer there."""
        gone = [chunk for chunk in self._mapped if chunk not in alive]
        if gone:
            self._mapped.difference_update(gone)
            self.send(m.Unmap(gone))

    def settle(self, counters: Sequence[int], streams: bool) -> None:
        """Forget the work that is done.

        The clock of the next one starts again where the worker got on or compiles, or where the lead has not come to
        releasing it yet; `streams`: whether work is released by a stream, and not before it is sent.
        """
        before, progress = len(self.owed), self._progress
        self._progress = counters[self.progress]
        while self.owed and reached(counters[self.done], self.owed[0].seq):
            self.refused.discard(self.owed.popleft().seq)
        moved = len(self.owed) < before or self._progress != progress or self.compiles
        if moved or (self.owed and self._is_held(self.owed[0], counters, streams)):
            self._moved_s = time.monotonic()

    def _is_held(self, work: Work | Replayed, counters: Sequence[int], streams: bool) -> bool:
        """Whether what the worker has to do next is not released yet."""
        if isinstance(work, Work):
            return streams and not reached(counters[SUBMITTED], work.seq)
        left = work.left(counters[self.progress])
        return not reached(counters[SUBMITTED], work.seq) or (bool(left) and counters[STEP] < left[0].seq)

    def stalled_s(self) -> float:
        """For how many seconds the worker has owed the same work."""
        if not self.owed:
            return 0.0
        return time.monotonic() - max(self.owed[0].since_s, self._moved_s)

    @property
    def preparing(self) -> list[int]:
        """The layouts that the worker has not answered for."""
        return list(self._asked)

    def unread_bytes(self) -> int:
        """How much of what it was sent for its steps the worker has not read."""
        return self._channel.unread_bytes(self.index)

    def signal(self, number: int) -> bool:
        """Send the process a signal; False where there is none."""
        if self._pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def preparing_s(self) -> float:
        """For how many seconds the worker, once started, has not got on with what it is to prepare."""
        if not self._asked or not self.started:
            return 0.0
        now_s = time.monotonic()
        return now_s - max(min([*self._asked.values()], default=now_s), self._moved_s)

    def forget(self, layouts: Sequence[int], jobs: Sequence[int], relays: Sequence[int]) -> None:
        """Have the worker drop what will not be used again."""
        self.prepared.difference_update(layouts)
        for layout in layouts:
            self.no_memory.pop(layout, None)
            if layout not in self._compiling:  # else the worker is at it until it answers
                self._asked.pop(layout, None)
        for relay in relays:
            self.recorded.pop(relay, None)
        self.send(m.Forget([*layouts], [*jobs], [*relays]))

    def stop(self) -> None:
        """Have the worker end; a lost one too, if it is there at all."""
        if not self.exited():
            self._channel.send(self.index, m.Stop())
        self.dismiss()

    def dismiss(self) -> None:
        """Let go of the process: another one has its place, or none is needed."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
