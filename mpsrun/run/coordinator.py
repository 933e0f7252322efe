"""The coordinator: lives in the lead, owns its workers and the memory that it shares with them; all steps ask it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mpsrun.config import Config
from mpsrun.device import Device
from mpsrun.device.arena import Arena, Room
from mpsrun.errors import NotNow
from mpsrun.run import state as modes
from mpsrun.run.crossing import Crossing, Handed
from mpsrun.run.garbage import Garbage
from mpsrun.run.link import STEP, SUBMITTED, Link, Replayed, Work
from mpsrun.run.pool import Pool
from mpsrun.run.recorder import give_back_memory
from mpsrun.run.relay import Relay
from mpsrun.run.setup import Setup
from mpsrun.run.standin import StandIn
from mpsrun.run.watcher import Watcher
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

T = TypeVar("T")


class Coordinator:
    """One a process and device. `lock` orders all submissions; the watching thread never takes it."""

    def __init__(
        self,
        settings: Config,
        device: Device,
        end_worker: Callable[[int], None],
        when_started: Callable[[Coordinator], None],
    ) -> None:
        self.settings = settings
        self.device = device
        self.lock = threading.RLock()
        addresses = [settings.worker_socket(i) for i in range(1, settings.worker_count() + 1)]
        self._channel = LeadChannel(addresses, settings.report_socket, settings.secret_file.read_bytes())
        self.pool = Pool(settings, device, self._channel, self._report)
        self.links = self.pool.links
        self._arena = Arena(device, lambda handle: self.pool.tell(m.Map(handle)))
        self._standin = StandIn(device, self._arena.chunks.__getitem__)
        self._watcher = Watcher(
            settings,
            device,
            self._channel,
            self.links,
            self._standin,
            end_worker,
            lambda: when_started(self),
            self._describe,
        )
        self.setup = Setup(settings, device, self.lock, self.links, self._watcher, self.begin)
        self.garbage = Garbage()
        self.flags = modes.flags()
        self._graph_task = -1
        self._retired: deque[tuple[Room, int, Sequence[tuple[int, int]]]] = deque()
        self._thread: int | None = None
        self.crowded = False  # several threads call networks: between two ops of one, another may bind
        self.closed = self._has_begun = False
        self._watcher.start()
        if settings.mps == "on":  # which is checked once workers have started
            self.begin()

    def begin(self) -> None:
        """Have all workers open their devices, which takes memory: once, when the first of them is needed."""
        with self.lock:
            if not self._has_begun:
                self._has_begun = True
                for link in self.links:
                    self._start(link)

    def _start(self, link: Link) -> None:
        self.pool.start(link)
        for chunk in self._arena.chunks.values():
            link.send(m.Map(chunk.handle))

    # ---- what crossings ask for; the caller holds `lock`

    def admit(self) -> None:
        """A call of a graph begins, and no region is under way: take in the workers that were started again."""
        if self._watcher.heirs and not self.closed:
            with self.lock:
                for index in list(self._watcher.heirs):
                    if self.links[index - 1].lost is not None:
                        heir = self._watcher.heirs.pop(index, None)
                        if heir is not None:  # and did not end just now
                            self._take_in(heir)

    def _take_in(self, heir: Link) -> None:
        """Give a process the place of the one before it, and tell it of the memory that is shared."""
        former = self.pool.replace(heir)
        self._watcher.took_in(former)
        former.is_ended = True
        former.dismiss()
        if self._has_begun:
            self._start(heir)

    def enter(self) -> None:
        """A call of a graph begins: note its thread, and the global settings, which cannot change during it."""
        thread = threading.get_ident()
        if thread != self._thread:
            self.crowded = self._thread is not None
            self._thread = self._thread or thread
        self.flags = modes.flags()

    def read_flags_in_backward(self) -> None:
        """Note the global settings once for each backward pass of autograd's."""
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task = task
            self.flags = modes.flags()

    def changed_flags(self, links: Sequence[Link]) -> m.Flags | None:
        """The global settings, where one of these workers does not know them."""
        for link in links:
            if not link.knows(self.flags):
                return self.flags
        return None

    def fail(self, error: Exception) -> None:
        """Have the lead raise this at its next crossing."""
        self._watcher.fail(error)

    def check(self) -> None:
        """Raise what the watching thread could not raise itself: a worker's error under --strict, a failed stand-in."""
        self._watcher.check()

    def take(self, size_bytes: int) -> Room:
        """A slot whose former users are done with it, in the order of the current stream."""
        while self._retired:
            room, stream, pending = self._retired.popleft()
            self._arena.give_back(room, stream, pending)
        room = self._arena.take(size_bytes)
        if room.pending:
            counters, values = zip(*room.pending, strict=True)
            self.pool.wait(counters, values)
            self._watcher.take_failures(room.pending)  # of an invocation that nobody asks for any more
            room.pending = []
        return room

    def retire(self, room: Room, stream: int, pending: Sequence[tuple[int, int]]) -> None:
        """Give a slot back. Safe in a finalizer: it only appends."""
        if not self.closed:
            self._retired.append((room, stream, pending))

    def submit(
        self, crossing: Crossing, links: Sequence[Link], message: m.Forward | m.Backward, forward: Handed
    ) -> None:
        """Hand out work to these workers, and the forward that it belongs to.

        First it is remembered, so that whatever goes wrong from here on, somebody will do it; then the workers are
        released in stream order, then told.
        """
        if self.garbage.waiting:
            self._tidy()
        work = Work(message, forward, crossing, time.monotonic())
        for link in links:
            link.remember(work)
        if self.device.kind == "cuda":
            self.pool.release((SUBMITTED,), (message.seq,))
        for link in links:
            link.send_step(message)

    def wait(self, counters: Sequence[int], value: int) -> None:
        """Wait until the workers have done the work of this number (on a GPU: make the stream wait).

        On a CPU, raises what the work raised in a worker and in its stand-in; on a GPU `check` does, a little later.
        """
        self.pool.wait(counters, (value,) * len(counters))
        if self.device.kind == "cpu":
            self.check()
            for error in self._watcher.take_failures([(counter, value) for counter in counters]):
                raise error

    # ---- relays

    def record(self, relay: Relay) -> None:
        """Have the workers record their parts of a relay. Does not wait."""
        with self.lock:
            self._tidy()
            for link in relay.links:
                link.send(m.Record(relay.number, [work.message for work in relay.of(link)], self.flags))

    def wait_recorded(self, relay: Relay) -> None:
        """Wait until all workers have recorded their parts.

        Raises `NotShippable` with the reason of one that could not, and `NotNow` where one was lost or does not answer:
        the next step that runs uncaptured will find that out.
        """
        deadline = time.monotonic() + self.settings.timeout_s
        with self._watcher.changed:
            while not relay.is_recorded():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise NotNow(f"a worker has not recorded its part within {self.settings.timeout_s:g} s")
                self._watcher.changed.wait(min(left_s, 1.0))

    def replay(self, relay: Relay, run: Callable[[], T]) -> T:
        """Have the workers replay a relay, and do the lead's own part of it, which is `run`.

        Counters are reset here: what wrote and read them in the last replay is over, since the wait at the end of it is
        behind us in stream order.
        """
        with self.lock:
            self.check()
            if self.garbage.waiting:
                self._tidy()
            seq = self.pool.next_sequence()
            message = m.Replay(seq, relay.number, self.changed_flags(relay.links))
            now_s = time.monotonic()
            for link in relay.links:
                link.remember(Replayed(message, relay.of(link), now_s))
            self.pool.release(relay.reset, (*(0 for _ in relay.reset[1:]), seq))
            for link in relay.links:
                link.send_step(message)
            try:
                result = run()
            except BaseException:  # on a CPU, where `run` computes
                self.device.signal((STEP,), (len(relay.steps),))
                self.pool.wait(relay.done, (seq,) * len(relay.done))
                raise
            self.wait(relay.done, seq)
            return result

    # ---- what is known of the workers

    @property
    def changes(self) -> int:
        """Grows where a worker took the place of another one, or had no memory for something."""
        return self._watcher.taken_in + self._watcher.shortages

    @property
    def stirs(self) -> tuple[int, ...]:
        """Different from what it was if workers were lost, came back, compile or were bound to other memory."""
        watcher = self._watcher
        return watcher.losses, watcher.taken_in, watcher.shortages, self.pool.compiles, self.setup.binds

    def counts(self, timeout_s: float = 10.0) -> dict[int, m.Counts]:
        """How often each worker ran each job, asked of the workers themselves."""
        asked = [link for link in self.links if link.started and link.lost is None]
        with self.lock:
            for link in asked:
                link.counts = None
                link.send(m.Count())
        deadline = time.monotonic() + timeout_s
        with self._watcher.changed:
            while any(link.counts is None and link.lost is None for link in asked) and time.monotonic() < deadline:
                self._watcher.changed.wait(0.1)
        return {link.index: link.counts for link in asked if link.counts is not None}

    @property
    def epoch(self) -> int:
        """How many workers were lost for good so far: plans of an earlier epoch are void."""
        return self._watcher.epoch

    def usable(self) -> list[int]:
        """The workers that can be planned with: all which are there, or will be there again."""
        return [link.index for link in self.links if not link.is_last]

    def present(self) -> list[int]:
        """The workers that are not lost, or not any more."""
        return [link.index for link in self.links if link.lost is None]

    # ---- memory

    @property
    def arena_bytes(self) -> int:
        """The memory of all slots, which lead and workers share."""
        return sum(chunk.handle.size_bytes for chunk in self._arena.chunks.values())

    def trim(self) -> None:
        """Give back the GPU memory that lead and workers keep for later use: others have none."""
        with self.lock:
            self._tidy()
            self.pool.tell(m.Trim())
        if self.device.kind == "cuda":
            give_back_memory()

    def _tidy(self) -> None:
        """Tell the workers what they need not keep."""
        for link, kept in self.garbage.collect().items():
            if invocations := kept.get("invocation"):
                link.send(m.Drop(invocations))
                self._standin.drop(invocations)
            layouts, jobs, relays = (kept.get(kind, []) for kind in ("layout", "job", "relay"))
            if layouts or jobs or relays:
                link.forget(layouts, jobs, relays)
                self._standin.forget(layouts, jobs)

    # ---- reports

    def _report(self, reason: str) -> None:
        self._watcher.report(reason)

    def _describe(self) -> str:
        """What is handed out, for a report."""
        slots = self._arena.in_use - len(self._retired)
        return f"sequence number {self.pool.sequence}; slots in use: {slots}, in chunks: {len(self._arena.chunks)}"

    # ---- the end

    def close(self) -> None:
        """Stop the workers and the thread. What was compiled before runs plain from now on."""
        self.closed = True
        self._watcher.stop()
        for link in self.links:
            link.stop()
        for heir in self._watcher.heirs.values():
            heir.dismiss()
        self._channel.close()

    def free(self) -> None:
        """Give the shared memory back. The workers must have ended, and nothing may cross any more."""
        self._standin.clear()
        self._retired.clear()
        self._arena.close()
        self.pool.free()
