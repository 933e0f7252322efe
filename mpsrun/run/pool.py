"""The workers as the lead has them: who is there, in which order they are given work, and the wait for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from mpsrun.config import Config, available_cores
from mpsrun.device import Device
from mpsrun.device.base import COUNTER_BYTES
from mpsrun.errors import WorkerError
from mpsrun.run.link import SEQUENCE_MASK, STEP, SUBMITTED, Link
from mpsrun.run.watcher import GRACE
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

LEVEL_EVERY = 1 << 29


class Pool:
    """All workers of the lead, and the counters that they share with it. The coordinator's lock orders what submits.

    links: worker 1 first; another process in the place of a lost one has another link. sequence: the number of the
    latest submission. report: tells what is known of every process, where a wait ran out.
    """

    def __init__(self, settings: Config, device: Device, channel: LeadChannel, report: Callable[[str], None]) -> None:
        self._settings = settings
        self._device = device
        self._channel = channel
        self._report = report
        self._counters = device.new_chunk(COUNTER_BYTES)
        device.bind_counters(self._counters)
        self._numbers = itertools.count(STEP + 1)  # of counters
        self._last_stream: int | None = None
        self.sequence = 0
        self.links = [
            Link(i, channel, next(self._numbers), next(self._numbers)) for i in range(1, settings.worker_count() + 1)
        ]

    def start(self, link: Link) -> None:
        """Have a worker open its device."""
        index = getattr(self._device, "index", 0)
        threads = max(1, available_cores() // (len(self.links) + 1))
        counters = self._counters.handle
        ring = self._channel.ring_of(link.index)
        numbers = SUBMITTED, link.done, STEP, link.progress
        link.since_s = time.monotonic()  # first: the watching thread may look in between
        link.called = True
        link.send(m.Start(m.PROTOCOL, self._device.kind, index, counters, *numbers, threads, ring))

    def replace(self, heir: Link) -> Link:
        """Give a process the place of the one before it, and counters and a ring that nobody used; returns the former.

        What was handed to that one stays with its link, whose work is the stand-in's. The new counter starts where the
        others may be: left at 0, it would seem to be ahead once the numbers are large.
        """
        heir.done, heir.progress = next(self._numbers), next(self._numbers)
        heir.last = self.sequence
        heir.since_s = time.monotonic()
        self.release((heir.done,), (heir.last,))
        self._channel.renew(heir.index, self._settings.worker_socket(heir.index, heir.generation))
        former = self.links[heir.index - 1]
        self.links[heir.index - 1] = heir
        return former

    def tell(self, message: m.ToWorker) -> None:
        """Send every worker that was told to start the same."""
        for link in self.links:
            if link.called:
                link.send(message)

    @property
    def compiles(self) -> bool:
        """Whether a worker may be compiling."""
        return any(link.compiles for link in self.links)

    # ---- the order of submissions

    def next_sequence(self) -> int:
        """The number of the next submission; work of several workers shares one."""
        self.sequence = (self.sequence + 1) & SEQUENCE_MASK
        if not self.sequence % LEVEL_EVERY:
            self._level()
        return self.sequence

    def release(self, counters: Sequence[int], values: Sequence[int]) -> None:
        """Set counters in stream order, which is that of the messages, from whatever stream they are set."""
        if self._device.kind == "cuda":
            stream = self._device.stream_key()
            if self._last_stream is not None and self._last_stream != stream:
                self._device.follow(self._last_stream)
            self._last_stream = stream
        self._device.signal(counters, values)

    def wait(self, counters: Sequence[int], values: Sequence[int]) -> None:
        """Wait until these counters have come to these values (on a GPU: make the stream wait).

        The time does not run while a worker compiles, which the watching thread ends one day. Raises `WorkerError`
        where it ran out.
        """
        while True:
            try:
                self._device.wait(counters, values, self._settings.timeout_s * GRACE + 10)
            except TimeoutError as error:
                if self.compiles:
                    continue
                self._report(f"neither a worker nor its stand-in answered: {error}")
                raise WorkerError(f"a worker did not answer, and neither did its stand-in: {error}") from error
            else:
                return

    def _level(self) -> None:
        """Lift the counters of idle workers: left too far behind, they would seem to be ahead."""
        for link in self.links:
            self.wait((link.done,), (link.last,))
            link.last = (self.sequence - 1) & SEQUENCE_MASK
            self._device.signal((link.done,), (link.last,))

    def free(self) -> None:
        """Give the counters back. Nobody may use them any more."""
        self._device.close_chunk(self._counters)
