"""The coordinator: lives in the lead, owns the arena and the links to the workers; crossings go through it."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mpsrun import log
from mpsrun.config import Config, available_cores
from mpsrun.device import ChunkHandle, Device
from mpsrun.device.arena import Arena, Room
from mpsrun.device.base import COUNTER_BYTES
from mpsrun.errors import NotNow, NotShippable, WorkerError
from mpsrun.run import state as modes
from mpsrun.run.crossing import Crossing, Handed, Share
from mpsrun.run.link import SEQUENCE_MASK, STEP, SUBMITTED, Link, Replayed, Work
from mpsrun.run.relay import Relay
from mpsrun.run.standin import StandIn
from mpsrun.run.watcher import Watcher
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

T = TypeVar("T")
LEVEL_EVERY = 1 << 29
GRACE = 2.0  # a wait outlasts the watchdog by this factor, so that the watchdog is what ends it


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
        count = settings.worker_count()
        addresses = [settings.worker_socket(i) for i in range(1, count + 1)]
        self._channel = LeadChannel(addresses, settings.report_socket, settings.secret_file.read_bytes())
        self._counter_numbers = itertools.count(STEP + 1)
        self.links = [
            Link(i, self._channel, next(self._counter_numbers), next(self._counter_numbers))
            for i in range(1, count + 1)
        ]
        self._counters = device.new_chunk(COUNTER_BYTES)
        device.bind_counters(self._counters)
        self._arena = Arena(device, self._announce)
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
        self.flags = modes.flags()
        self._ids = itertools.count(1)
        self._relays = itertools.count(1)
        self._binds = 0
        self._sequence = 0
        self._graph_task = -1
        self._retired: deque[tuple[Room, int, Sequence[tuple[int, int]]]] = deque()
        self._abandoned: deque[tuple[tuple[Link, ...], int]] = deque()
        self._forgotten: deque[tuple[Link, int, int]] = deque()
        self._discarded: deque[tuple[int, tuple[Link, ...]]] = deque()
        self._last_stream: int | None = None
        self._thread: int | None = None
        self.crowded = False  # several threads call networks: between two ops of one, another may bind
        self.closed = False
        for link in self.links:
            self._start(link)
        self._watcher.start()

    # ---- what crossings ask for; the caller holds `lock`

    def next_invocation(self) -> int:
        return next(self._ids)

    def admit(self) -> None:
        """A call of a graph begins, and no region is under way: take in the workers that were started again."""
        if self._watcher.heirs and not self.closed:
            with self.lock:
                for index in list(self._watcher.heirs):
                    if self.links[index - 1].lost is not None:
                        heir = self._watcher.heirs.pop(index, None)
                        if heir is not None:  # and did not end just now
                            self._take_in(heir)

    def enter(self) -> None:
        """A call of a graph begins: note its thread, and the global settings, which cannot change during it."""
        thread = threading.get_ident()
        if thread != self._thread:
            self.crowded = self._thread is not None
            self._thread = self._thread or thread
        self.flags = modes.flags()

    def next_sequence(self) -> int:
        """The number of the next submission; work of several workers shares one."""
        self._sequence = (self._sequence + 1) & SEQUENCE_MASK
        if not self._sequence % LEVEL_EVERY:
            self._level()
        return self._sequence

    def read_flags_in_backward(self) -> None:
        """Note the global settings once for each backward pass of autograd's."""
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task = task
            self.flags = modes.flags()

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
            self._wait(counters, values)
            self._watcher.take_failures(room.pending)  # of an invocation that nobody asks for any more
            room.pending = []
        return room

    def retire(self, room: Room, stream: int, pending: Sequence[tuple[int, int]]) -> None:
        """Give a slot back. Safe in a finalizer: it only appends."""
        if not self.closed:
            self._retired.append((room, stream, pending))

    def abandon(self, links: Sequence[Link], invocation: int) -> None:
        """These workers will not be asked for a backward of an invocation. Safe in a finalizer: it only appends."""
        self._abandoned.append((tuple(links), invocation))

    def forget(self, parts: Sequence[tuple[Link, int, int]]) -> None:
        """Layouts and jobs, by link, that will not be used again. Safe in a finalizer: it only appends."""
        self._forgotten.extend(parts)

    def discard(self, relay: int, links: tuple[Link, ...]) -> None:
        """A relay will not be replayed again by these workers. Safe in a finalizer: it only appends."""
        self._discarded.append((relay, links))

    def trim(self) -> None:
        """Give back the GPU memory that lead and workers keep for later use: others have none."""
        with self.lock:
            self._tidy()
            for link in self.links:
                link.send(m.Trim())
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def submit(
        self, crossing: Crossing, links: Sequence[Link], message: m.Forward | m.Backward, forward: Handed
    ) -> None:
        """Hand out work to these workers, and the forward that it belongs to.

        First it is remembered, so that whatever goes wrong from here on, somebody will do it; then the workers are
        released in stream order, then told.
        """
        if self._abandoned or self._forgotten or self._discarded:
            self._tidy()
        work = Work(message, forward, crossing, time.monotonic())
        for link in links:
            link.remember(work)
        if self.device.kind == "cuda":
            self._keep_order()
            self.device.signal((SUBMITTED,), (message.seq,))
        for link in links:
            link.send_step(message)

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
            while True:
                if any(link.lost is not None for link in relay.links):
                    raise NotNow("a worker was lost")
                waiting = [link for link in relay.links if relay.number not in link.recorded]
                for link in relay.links:
                    if reason := link.recorded.get(relay.number):
                        raise NotShippable(f"in worker {link.index}: {reason}")
                if not waiting:
                    return
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
            if self._abandoned or self._forgotten or self._discarded:
                self._tidy()
            seq = self.next_sequence()
            message = m.Replay(seq, relay.number, self.changed_flags(relay.links))
            now_s = time.monotonic()
            for link in relay.links:
                link.remember(Replayed(message, relay.of(link), now_s))
            if self.device.kind == "cuda":
                self._keep_order()
            self.device.signal(relay.reset, (*(0 for _ in relay.reset[1:]), seq))
            for link in relay.links:
                link.send_step(message)
            try:
                result = run()
            except BaseException:  # on a CPU, where `run` computes
                self.device.signal((STEP,), (len(relay.steps),))
                self._wait(relay.done, (seq,) * len(relay.done))
                raise
            self.wait(relay.done, seq)
            return result

    def wait_for_step(self, counters: Sequence[int], number: int) -> None:
        """Wait until these workers have finished a step of the present replay."""
        self._wait(counters, (number,) * len(counters))

    def changed_flags(self, links: Sequence[Link]) -> m.Flags | None:
        """The global settings, where one of these workers does not know them."""
        for link in links:
            if not link.knows(self.flags):
                return self.flags
        return None

    def wait(self, counters: Sequence[int], value: int) -> None:
        """Wait until the workers have done the work of this number (on a GPU: make the stream wait).

        On a CPU, raises what the work raised in a worker and in its stand-in; on a GPU `check` does, a little later.
        """
        self._wait(counters, (value,) * len(counters))
        if self.device.kind == "cpu":
            self.check()
            for error in self._watcher.take_failures([(counter, value) for counter in counters]):
                raise error

    def _wait(self, counters: Sequence[int], values: Sequence[int]) -> None:
        try:
            self._wait_while_compiling(counters, values)
        except TimeoutError as error:
            self._watcher.report(f"neither a worker nor its stand-in answered: {error}")
            raise WorkerError(f"a worker did not answer, and neither did its stand-in: {error}") from error

    def _wait_while_compiling(self, counters: Sequence[int], values: Sequence[int]) -> None:
        """As `device.wait`; the time does not run while a worker compiles, which the watching thread ends one day."""
        while True:
            try:
                self.device.wait(counters, values, self.settings.timeout_s * GRACE + 10)
            except TimeoutError:
                if not self._compiles:
                    raise
            else:
                return

    @property
    def _compiles(self) -> bool:
        return any(link.compiles for link in self.links)

    def bind(self, crossing: Crossing, args: Sequence[Any] | Mapping[int, Any]) -> None:
        """Make sure that the workers see the parameters and buffers where they are now."""
        for share in crossing.shares:
            tensors = [args[i] for i in share.static_args]
            moved = [tensor.data_ptr() for tensor in tensors] != share.pointers
            if moved or not self.device.holds(share.chunks):
                self._bind(share, tensors)

    def _take_in(self, heir: Link) -> None:
        """Give a process the place of the one before it, and a counter and a ring that nobody used.

        What was handed to that one stays with its link, whose work is the stand-in's. The new counter starts where the
        others may be: left at 0, it would seem to be ahead once the numbers are large.
        """
        heir.done, heir.progress = next(self._counter_numbers), next(self._counter_numbers)
        heir.last = self._sequence
        heir.since_s = time.monotonic()
        if self.device.kind == "cuda":
            self._keep_order()
        self.device.signal((heir.done,), (heir.last,))
        self._channel.renew(heir.index, self.settings.worker_socket(heir.index, heir.generation))
        former = self.links[heir.index - 1]
        self.links[heir.index - 1] = heir
        self._watcher.took_in(former)
        former.is_ended = True
        former.dismiss()
        self._start(heir)
        for chunk in self._arena.chunks.values():
            heir.send(m.Map(chunk.handle))

    @property
    def changes(self) -> int:
        """Grows where a worker took the place of another one, or had no memory for something."""
        return self._watcher.taken_in + self._watcher.shortages

    @property
    def stirs(self) -> tuple[int, ...]:
        """Different from what it was if workers were lost, came back, compile or were bound to other memory."""
        watcher = self._watcher
        return watcher.losses, watcher.taken_in, watcher.shortages, self._compiles, self._binds

    def next_relay(self) -> int:
        """A number for a relay."""
        return next(self._relays)

    # ---- set-up of crossings

    def renew(self, crossing: Crossing, args: Sequence[Any]) -> Crossing:
        """The crossing with the workers that there are now; those that are new to it begin to prepare. Does not wait.

        `args` are those of the call that begins.
        """
        if all(link.lost is None for link in crossing.links):
            return crossing
        with self.lock:
            renewed = crossing.renewed(self.links)
            if renewed is None:
                return crossing
            try:
                self._introduce(renewed, [share for share in renewed.shares if share not in crossing.shares], args)
            except NotShippable as error:
                log.detail(f"a region stays in the lead: {error}")
                renewed.is_replaced = True
                return crossing
            crossing.is_replaced = True
        return renewed

    def prepare(self, crossing: Crossing, args: Sequence[Any]) -> None:
        """Send programs, parameters and layouts to the workers of a crossing. Does not wait."""
        with self.lock:
            self._introduce(crossing, crossing.shares, args)

    def _introduce(self, crossing: Crossing, shares: Sequence[Share], args: Sequence[Any]) -> None:
        for share in shares:
            share.link.send(m.Load(share.job, share.program))
        self.bind(crossing, args)
        for share in shares:
            share.link.send(share.layout)

    def is_ready(self, crossing: Crossing) -> bool:
        """Whether every worker of a crossing has prepared its part, or has no memory for it."""
        return all(share.link.answered(share.layout.layout) for share in crossing.shares)

    def wait_ready(self, crossings: Sequence[Crossing]) -> bool:
        """Wait until all of these are prepared; False where a worker was lost on the way or time ran out.

        The time does not run while one of them compiles.
        """
        limit_s = self.settings.timeout_s * GRACE
        deadline = time.monotonic() + limit_s
        links = [share.link for crossing in crossings for share in crossing.shares]
        with self._watcher.changed:
            while not all(self.is_ready(crossing) for crossing in crossings):
                if any(link.compiles for link in links):
                    deadline = time.monotonic() + limit_s
                left_s = deadline - time.monotonic()
                if left_s <= 0 or any(link.lost for link in links):
                    return False
                self._watcher.changed.wait(min(left_s, 1.0))
        return True

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

    def fail(self, error: Exception) -> None:
        """Have the lead raise this at its next crossing."""
        self._watcher.fail(error)

    @property
    def epoch(self) -> int:
        """How many workers were lost for good so far: plans of an earlier epoch are void."""
        return self._watcher.epoch

    @property
    def arena_bytes(self) -> int:
        """The memory of all slots, which lead and workers share."""
        return sum(chunk.handle.size_bytes for chunk in self._arena.chunks.values())

    def usable(self) -> list[int]:
        """The workers that can be planned with: all which are there, or will be there again."""
        return [link.index for link in self.links if not link.is_last]

    def present(self) -> list[int]:
        """The workers that are not lost, or not any more."""
        return [link.index for link in self.links if link.lost is None]

    def _bind(self, share: Share, tensors: Sequence[torch.Tensor]) -> None:
        refs = self.device.export(tensors)
        handles = self.device.exported()
        share.link.map_exports({ref.chunk: handles[ref.chunk] for ref in refs})
        wants = {place.index for place in share.layout.grad_inputs}
        statics = [m.Static(i, r, i in wants) for i, r in zip(share.static_inputs, refs, strict=True)]
        share.link.send(m.Bind(share.job, statics))
        share.link.unmap_exports(set(handles))
        share.binds += 1
        self._binds += 1
        share.chunks = tuple({ref.chunk for ref in refs})
        references = [weakref.ref(tensor) for tensor in tensors]
        share.statics = dict(zip(share.static_inputs, references, strict=True))
        share.pointers = [tensor.data_ptr() for tensor in tensors]

    def _announce(self, handle: ChunkHandle) -> None:
        for link in self.links:
            link.send(m.Map(handle))

    def _tidy(self) -> None:
        """Tell the workers what they need not keep."""
        dropped: defaultdict[Link, list[int]] = defaultdict(list)
        while self._abandoned:
            links, invocation = self._abandoned.popleft()
            for link in links:
                dropped[link].append(invocation)
        for link, invocations in dropped.items():
            link.send(m.Drop(invocations))
            self._standin.drop(invocations)
        forgotten: defaultdict[Link, list[tuple[int, int]]] = defaultdict(list)
        while self._forgotten:
            link, layout, job = self._forgotten.popleft()
            forgotten[link].append((layout, job))
        for link, parts in forgotten.items():
            layouts, jobs = [layout for layout, _ in parts], [job for _, job in parts]
            link.forget(layouts, jobs, ())
            self._standin.forget(layouts, jobs)
        while self._discarded:
            relay, links = self._discarded.popleft()
            for link in links:
                link.forget((), (), (relay,))

    def _level(self) -> None:
        """Lift the counters of idle workers: left too far behind, they would seem to be ahead."""
        for link in self.links:
            self._wait((link.done,), (link.last,))
            link.last = (self._sequence - 1) & SEQUENCE_MASK
            self.device.signal((link.done,), (link.last,))

    def _describe(self) -> str:
        """What is handed out, for a report."""
        slots = self._arena.in_use - len(self._retired)
        return f"sequence number {self._sequence}; slots in use: {slots}, in chunks: {len(self._arena.chunks)}"

    def _keep_order(self) -> None:
        """A worker's counter must grow in the order of its messages, whatever stream they are submitted from."""
        stream = self.device.stream_key()
        if self._last_stream is not None and self._last_stream != stream:
            self.device.follow(self._last_stream)
        self._last_stream = stream

    def _start(self, link: Link) -> None:
        index = getattr(self.device, "index", 0)
        threads = max(1, available_cores() // (len(self.links) + 1))
        counters = self._counters.handle
        ring = self._channel.ring_of(link.index)
        kind = self.device.kind
        numbers = SUBMITTED, link.done, STEP, link.progress
        link.send(m.Start(m.PROTOCOL, kind, index, counters, *numbers, threads, ring))

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
        self.device.close_chunk(self._counters)
