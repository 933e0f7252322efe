"""A worker process: does what the lead says, in the order in which it is said."""

from __future__ import annotations

import collections
import gc
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mpsrun import config
from mpsrun.config import REPORTED
from mpsrun.device import Chunk, ChunkHandle, Device, open_device, typed_view
from mpsrun.errors import MemoryGone, MpsrunError, in_a_line
from mpsrun.graph.program import validate
from mpsrun.launch.error_file import leave_error
from mpsrun.run.executor import Executor, Job
from mpsrun.run.recorder import Recording, recorder
from mpsrun.run.shortage import lacks_memory
from mpsrun.run.state import apply_flags, flags
from mpsrun.wire import messages as m
from mpsrun.wire.channel import WorkerChannel

POLL_S = 1.0
SPIN_S = 0.002  # longer than what lies between two messages of one step
FOREVER_S = 1e9  # a GPU-side wait; the watchdog of the lead ends it


class _Relay(NamedTuple):
    """A worker's part of a relay; jobs: by layout, those whose memory the recording uses, and keeps by this."""

    steps: Sequence[m.Forward | m.Backward]
    recording: Recording
    jobs: Mapping[int, Job]


class Worker:
    """Everything a worker knows: the device, the mapped chunks and the jobs."""

    def __init__(self, index: int, channel: WorkerChannel, generation: int = 0) -> None:
        self.index = index
        self.generation = generation
        self.channel = channel
        self._device: Device | None = None
        self._executor: Executor | None = None
        self._chunks: dict[int, Chunk] = {}
        self._gone: dict[int, str] = {}  # chunks that could not be mapped, and why
        self._submitted = self._done = self._step_counter = self._progress = 0
        self._relays: dict[int, _Relay] = {}
        self._spin_s = 0.0
        self._forwards: collections.Counter[int] = collections.Counter()
        self._backwards: collections.Counter[int] = collections.Counter()
        self._given_up: set[int] = set()  # invocations whose forward had no memory

    def run(self) -> int:
        """Serve until `Stop`; what raises is reported, and nothing more is done after it. Returns the exit status."""
        self.channel.send(m.Ready(self.index, os.getpid(), m.PROTOCOL, self.generation))
        message: m.ToWorker | None = None
        while not isinstance(message, m.Stop):
            try:
                message = self.channel.receive(POLL_S, self._spin_s)
                if message is not None:
                    self._handle(message)
            except Exception as error:  # noqa: BLE001 - whatever it is, the lead must hear of it
                self._fail(error)
                return REPORTED
        return 0

    def _handle(self, message: m.ToWorker) -> None:
        match message:
            case m.Forward() | m.Backward():
                self._step(message)
            case m.Record() | m.Replay():
                self._relay(message)
            case m.Drop():
                self._given_up.difference_update(message.invocations)
                self.executor.drop(message.invocations)
            case m.Map() | m.Unmap():
                self._remap(message)
            case m.Load():
                validate(message.program)
                self.executor.load(message.job, message.program)
            case m.Bind():
                self._bind(message)
            case m.Prepare():
                self._prepare(message)
            case m.Forget():
                self._forget(message)
            case m.Trim():
                self.device.give_back_memory()
            case m.Count():
                self.channel.send(self._counts())
            case m.Start():
                self._start(message)

    @property
    def device(self) -> Device:
        if self._device is None:
            raise MpsrunError("expected Start as the first message")
        return self._device

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            raise MpsrunError("expected Start as the first message")
        return self._executor

    def _start(self, message: m.Start) -> None:
        if message.protocol != m.PROTOCOL:
            raise MpsrunError(f"expected protocol {m.PROTOCOL}, found {message.protocol}: two versions of mpsrun?")
        torch.set_num_threads(message.threads)
        self._device = open_device(message.device, message.device_index)
        self._device.bind_counters(self._map(message.counters))
        self._executor = Executor(self._device, self._chunks.__getitem__)
        self._submitted, self._done = message.submitted, message.done
        self._step_counter, self._progress = message.step, message.progress
        self._spin_s = SPIN_S if message.threads > 1 else 0.0
        self.channel.send(m.Started(self.index, self.generation))

    def _counts(self) -> m.Counts:
        forwards, backwards = dict(self._forwards), dict(self._backwards)
        return m.Counts(self.index, forwards, backwards, len(self.executor.jobs), self.executor.kept, self.generation)

    def _map(self, handle: ChunkHandle) -> Chunk:
        chunk = self._chunks[handle.id] = self.device.open_chunk(handle)
        return chunk

    def _remap(self, message: m.Map | m.Unmap) -> None:
        if isinstance(message, m.Map):
            self._open(message.chunk)
        else:
            self._unmap(message.chunks)

    def _open(self, handle: ChunkHandle) -> None:
        """Map memory, unless it is gone again: the lead, which is ahead, may have dropped the network since."""
        try:
            self._map(handle)
        except MemoryGone as error:
            self._gone[handle.id] = str(error)

    def _unmap(self, chunks: list[int]) -> None:
        self.device.synchronize()  # what is queued may still read there
        for chunk in chunks:
            if self._gone.pop(chunk, None) is None:
                self.device.close_chunk(self._chunks.pop(chunk))

    def _bind(self, message: m.Bind) -> None:
        statics = {}
        for static in message.statics:
            if static.tensor.chunk in self._gone:
                self.executor.jobs[message.job].unbind(self._gone[static.tensor.chunk])
                return
            tensor = typed_view(self._chunks[static.tensor.chunk], static.tensor)
            statics[static.input] = tensor.requires_grad_(static.requires_grad)
        self.executor.jobs[message.job].bind(statics)

    def _prepare(self, message: m.Prepare) -> None:
        self.executor.layouts[message.layout] = message
        uncompiled = None
        if self.executor.jobs[message.job].unbound is None:
            before = flags()
            apply_flags(message.flags)
            try:
                with self.device.share(*message.share):
                    uncompiled = self.executor.compile(message) if message.compiled else None
                    if not message.compiled or uncompiled is not None:
                        self.executor.warm_up(message)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                self._give_up(0, message.layout, error)
                return
            finally:
                apply_flags(before)
        self.channel.send(m.Prepared(self.index, message.layout, self.generation, uncompiled))

    def _step(self, message: m.Forward | m.Backward) -> None:
        """Wait for the lead's tensors, compute, signal. On a GPU all three are only queued here."""
        apply_flags(message.flags)
        if self.device.kind == "cuda":  # on a CPU the message itself comes after the tensors
            self.device.wait([self._submitted], [message.seq], FOREVER_S)
        try:
            with self.device.share(*self.executor.layouts[message.layout].share):
                self._compute(message)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            asked_again = self.executor.layouts[message.layout].grad if isinstance(message, m.Forward) else message.keep
            (self._given_up.add if asked_again else self._given_up.discard)(message.invocation)
            self.executor.drop([message.invocation])
            self._give_up(message.seq, message.layout, error)
            self.device.wait([self._done], [message.seq], FOREVER_S)
        else:
            self.device.signal([self._done], [message.seq])

    def _forget(self, message: m.Forget) -> None:
        self.executor.forget(message.layouts, message.jobs)
        for relay in message.relays:
            self._relays.pop(relay, None)

    def _relay(self, message: m.Record | m.Replay) -> None:
        if isinstance(message, m.Record):
            self._record(message)
        else:
            self._replay(message)

    def _record(self, message: m.Record) -> None:
        """Record a relay. Where that cannot be, nothing has changed."""
        apply_flags(message.flags)
        reason = None
        try:
            self._relays[message.relay] = self._recorded(message)
        except (RuntimeError, MpsrunError) as error:
            reason = in_a_line(error)
        self.channel.send(m.Recorded(self.index, message.relay, reason, self.generation))

    def _recorded(self, message: m.Record) -> _Relay:
        maker = recorder(self.device.where)
        maker.make_room()
        forwards = [step for step in message.steps if isinstance(step, m.Forward)]
        jobs = {s.layout: self.executor.jobs[self.executor.layouts[s.layout].job].fixed() for s in forwards}

        def run() -> None:
            for step in message.steps:
                self.device.wait([self._step_counter], [step.seq], FOREVER_S)
                with self.device.share(*self.executor.layouts[step.layout].share):
                    if isinstance(step, m.Forward):
                        self.executor.forward(step, job=jobs[step.layout])
                    else:
                        self.executor.backward(step)
                self.device.signal([self._progress], [step.seq])

        return _Relay(message.steps, maker.record(run, self._forward_of(message)), jobs)

    def _forward_of(self, message: m.Record) -> Recording | None:
        """The recording whose backward is to be recorded, if it is one."""
        invocation = message.steps[0].invocation
        for relay in self._relays.values():
            if any(isinstance(step, m.Forward) and step.invocation == invocation for step in relay.steps):
                return relay.recording
        return None

    def _replay(self, message: m.Replay) -> None:
        """On a GPU this only queues a wait, a graph, and a signal."""
        apply_flags(message.flags)
        relay = self._relays[message.relay]
        if self.device.kind == "cuda":
            self.device.wait([self._submitted], [message.seq], FOREVER_S)
        relay.recording.replay()
        for step in relay.steps:
            done = self._forwards if isinstance(step, m.Forward) else self._backwards
            done[self.executor.layouts[step.layout].job] += 1
        self.device.signal([self._done], [message.seq])

    def _compute(self, message: m.Forward | m.Backward) -> None:
        job = self.executor.layouts[message.layout].job
        if isinstance(message, m.Forward):
            self.executor.forward(message)
            self._forwards[job] += 1
            return
        if message.invocation in self._given_up:
            raise torch.OutOfMemoryError("there was no memory for its forward")
        self.executor.backward(message)
        self._backwards[job] += 1

    def _give_up(self, seq: int, layout: int, error: RuntimeError) -> None:
        """Leave a piece of work to the lead: nothing of it is under way any more, and its memory is given back."""
        text = str(error)
        error.__traceback__ = None  # it holds the tensors that were computed so far
        gc.collect()
        self.device.synchronize()
        self.device.give_back_memory()
        self.channel.send(m.NoMemory(self.index, seq, layout, text, self.generation))

    def _fail(self, error: Exception) -> None:
        """Drain the device, so that nothing of this worker writes any more, then tell the lead."""
        text = "".join(traceback.format_exception(error))
        if self._device is not None:
            try:
                self._device.synchronize()
            except Exception as further:  # noqa: BLE001 - a broken CUDA context: the first error is the one to report
                text += f"\nwhile draining the device: {further}"
        leave_error(config.current().error_file(f"worker {self.index}"), error)
        report = m.Failed(self.index, type(error).__name__, str(error), text, self.generation)
        self.channel.send(report)


def main(index: int, generation: int) -> None:
    """Serve as worker `index`, from 1; the process is tied to its parent already. Does not return.

    generation: how many processes had this index before.
    """
    settings = config.current()
    secret = settings.secret_file.read_bytes()
    channel = WorkerChannel(settings.worker_socket(index, generation), settings.report_socket, secret)
    status = Worker(index, channel, generation).run()
    channel.close()
    os._exit(status)  # no interpreter shutdown: memory shared by CUDA IPC is closed by the driver, in whatever order
