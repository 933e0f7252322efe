"""The stand-in: computes in the lead what a lost worker owes, and only then releases whoever waits for it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from mpsrun.device import Chunk, Device
from mpsrun.errors import MpsrunError
from mpsrun.run import philox
from mpsrun.run.crossing import Share
from mpsrun.run.executor import Executor
from mpsrun.run.link import STEP, SUBMITTED, Link, Replayed, Work, reached
from mpsrun.wire import messages as m

Report = Callable[[Link, Work | Replayed, Exception], None]  # what the plain script would have raised


class StandIn:
    """Works through what lost workers owe, in order, on a stream of its own.

    It runs in the watching thread: the lead's main thread may be blocked in a wait for the very result.
    """

    def __init__(self, device: Device, chunk: Callable[[int], Chunk]) -> None:
        self._device = device
        self._chunk = chunk
        self._executor = Executor(device, chunk)
        # Another priority is another hardware queue: not the one in which the lead's stream is held.
        self._stream = torch.cuda.Stream(priority=-1) if device.kind == "cuda" else None

    def finish(self, link: Link, submitted: int | None, report: Report) -> None:
        """Do what this link owes, as far as the lead's stream has come (it has released the work up to `submitted`).

        Of a worker that is not lost this is what it refused to do, and has come to.

        Nothing here waits on the GPU: two lost workers may wait for each other's results. What the plain script would
        have raised goes to `report` before anybody who waits is released.
        """
        while link.owed and (submitted is None or reached(submitted, link.owed[0].seq)):
            work = link.owed[0]
            if link.lost is None and work.seq not in link.refused:
                return
            if isinstance(work, Replayed):
                if not self._finish_replay(link, work, report):
                    return
                with self._on_stream():
                    self._device.signal([link.done], [work.seq])
            else:
                self._compute(link, work, link.done, functools.partial(report, link, work))
            link.owed.popleft()
            link.refused.discard(work.seq)

    def _finish_replay(self, link: Link, replay: Replayed, report: Report) -> bool:
        """Do the steps of a replay that are released and not done; returns whether none is left."""
        seen = self._device.read_counters(wait=True)
        if seen is None or not reached(seen[SUBMITTED], replay.seq):
            return False  # step and progress are still those of another replay
        while True:
            seen = self._device.read_counters(wait=True)
            if seen is None:
                return False
            left = replay.left(seen[link.progress])
            if not left or seen[STEP] < left[0].seq:
                return not left
            self._compute(link, left[0], link.progress, functools.partial(report, link, replay))
            replay.stood_in = left[0].seq

    def _compute(self, link: Link, work: Work, counter: int, failed: Callable[[Exception], None]) -> None:
        """Do one piece of work, then set the counter that says so."""
        with self._on_stream(), philox.undisturbed(self._device.kind):
            try:
                self._do(work, work.crossing.share_of[link])
            except Exception as error:  # noqa: BLE001 - it belongs to the script
                failed(error)
                self._executor.spoil(work.message)
            self._device.signal([counter], [work.seq])

    def warm_up(self) -> None:
        """Have this thread's libraries loaded before the lead's stream is ever held."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                some = torch.ones(8, 8, device="cuda")
                torch._foreach_copy_([some, some], [some @ some, some])
            self._stream.synchronize()

    def forget(self, layouts: list[int], jobs: list[int]) -> None:
        """Forget what will not be used again."""
        self._executor.forget(layouts, jobs)

    def clear(self) -> None:
        """Forget everything: no more work will come."""
        self._executor = Executor(self._device, self._chunk)

    def drop(self, invocations: list[int]) -> None:
        """Forget forwards whose backward will not come."""
        self._executor.drop(invocations)

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _do(self, work: Work, share: Share) -> None:
        self._know(share, work.forward.statics[share.layout.position])
        if isinstance(work.message, m.Forward):
            self._executor.forward(work.message)
            return
        if not self._executor.has(work.message):  # the activations died with the worker
            self._executor.forward(work.forward.message, write=False)
        self._executor.backward(work.message)

    def _know(self, share: Share, statics: Mapping[int, weakref.ref[torch.Tensor]]) -> None:
        """Make the executor this worker's: layouts of one crossing have the same number for all its workers."""
        if share.job not in self._executor.jobs:
            self._executor.load(share.job, share.program)
        self._executor.layouts[share.layout.layout] = share.layout
        wants = {place.index for place in share.layout.grad_inputs}
        bound = {}
        for i, reference in statics.items():
            tensor = reference()
            if tensor is None:
                raise MpsrunError("expected the parameters of a step that is under way, found them gone")
            bound[i] = tensor.detach().requires_grad_(i in wants)
        self._executor.jobs[share.job].bind(bound)
