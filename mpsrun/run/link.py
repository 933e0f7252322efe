"""The lead's view of one worker: what it has been told, what it still owes, and whether it can be relied on."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from mpsrun.device import ChunkHandle
from mpsrun.errors import MpsrunError
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

if TYPE_CHECKING:
    from mpsrun.run.crossing import Crossing, Handed

SEQUENCE_MASK = 0xFFFFFFFF
SUBMITTED = 0  # the counter with the last sequence number that the lead's streams have released to the workers


class Work(NamedTuple):
    """Work that was handed out to the workers of a crossing: enough for somebody else to do it."""

    message: m.Forward | m.Backward
    forward: Handed
    crossing: Crossing
    since_s: float

    @property
    def seq(self) -> int:
        return self.message.seq


def reached(counter: int, value: int) -> bool:
    """Whether a 32-bit counter that wraps has come to a sequence number."""
    return (counter - value) & SEQUENCE_MASK < 0x80000000


class Link:
    """One worker. Sends are ordered by the caller's lock.

    States: *coming* (no Ready yet), *up* (started), *lost* (what it owes is the stand-in's). There is no way back.
    """

    def __init__(self, index: int, channel: LeadChannel) -> None:
        self.index = index
        self.done = index  # the counter which says what this worker has done
        self.pid: int | None = None
        self.started = False
        self.lost: str | None = None
        self.prepared: set[int] = set()
        self.owed: deque[Work] = deque()
        self.last = 0  # the sequence number of its latest work
        self.counts: m.Counts | None = None
        self._channel = channel
        self._flags: m.Flags | None = None
        self._mapped: set[int] = set()
        self._pidfd: int | None = None
        self._moved_s = 0.0

    def ready(self, message: m.Ready) -> None:
        """The worker is there. Raises where it was there before, speaks another protocol or is gone already."""
        if self.pid is not None:
            raise MpsrunError(f"worker {self.index}: expected to hear Ready once, found another from {message.pid}")
        if message.protocol != m.PROTOCOL:
            raise MpsrunError(f"worker {self.index}: expected protocol {m.PROTOCOL}, found {message.protocol}")
        try:
            self._pidfd = os.pidfd_open(message.pid)
        except (OSError, OverflowError) as error:
            raise MpsrunError(f"worker {self.index} (pid {message.pid}) ended before it started") from error
        self.pid = message.pid

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
            self._channel.send(self.index, message)

    def remember(self, work: Work) -> None:
        """Note what is owed from now on, whether it can be sent or not."""
        self.last = work.message.seq
        self.owed.append(work)

    def send_step(self, message: m.Forward | m.Backward) -> None:
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

    def settle(self, done: int, submitted: int | None = None) -> None:
        """Forget the work up to sequence number `done`.

        The clock of the next one starts again where the worker got on, or where the lead's own stream has not come to
        releasing it yet (it has come to `submitted`).
        """
        before = len(self.owed)
        while self.owed and reached(done, self.owed[0].seq):
            self.owed.popleft()
        held = submitted is not None and self.owed and not reached(submitted, self.owed[0].seq)
        if len(self.owed) < before or held:
            self._moved_s = time.monotonic()

    def stalled_s(self) -> float:
        """For how many seconds the worker has owed the same work."""
        if not self.owed:
            return 0.0
        return time.monotonic() - max(self.owed[0].since_s, self._moved_s)

    def forget(self, layouts: list[int], jobs: list[int]) -> None:
        """Have the worker drop what will not be used again."""
        self.prepared.difference_update(layouts)
        self.send(m.Forget(layouts, jobs))

    def stop(self) -> None:
        """Have the worker end; a lost one too, if it is there at all."""
        if not self.exited():
            self._channel.send(self.index, m.Stop())
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
