"""Set-up of crossings: what workers are told before the first step, and told again where parameters move."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpsrun import log
from mpsrun.config import Config
from mpsrun.device import Device
from mpsrun.errors import NotShippable
from mpsrun.run.crossing import Crossing, Share
from mpsrun.run.link import Link
from mpsrun.run.watcher import GRACE, Watcher
from mpsrun.wire import messages as m


class Setup:
    """Has workers prepare crossings: `Load` (the program), `Bind` (parameters and buffers), `Prepare` (the layout).

    lock: the coordinator's. links: those that there are now. begin: has them start, once. binds: how often workers were
    bound to other memory.
    """

    def __init__(
        self,
        settings: Config,
        device: Device,
        lock: threading.RLock,
        links: Sequence[Link],
        watcher: Watcher,
        begin: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._device = device
        self._lock = lock
        self._links = links
        self._watcher = watcher
        self._begin = begin
        self.binds = 0

    def prepare(self, crossing: Crossing, args: Sequence[Any]) -> None:
        """Send programs, parameters and layouts to the workers of a crossing. Does not wait."""
        with self._lock:
            self._introduce(crossing, crossing.shares, args)

    def renew(self, crossing: Crossing, args: Sequence[Any]) -> Crossing:
        """The crossing with the workers that there are now; those that are new to it begin to prepare. Does not wait.

        `args` are those of the call that begins.
        """
        if all(link.lost is None for link in crossing.links):
            return crossing
        with self._lock:
            renewed = crossing.renewed(self._links)
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

    def wait_ready(self, crossings: Sequence[Crossing]) -> bool:
        """Wait until all of these are prepared; False where a worker was lost on the way or time ran out.

        The time does not run while one of them compiles.
        """
        limit_s = self._settings.timeout_s * GRACE
        deadline = time.monotonic() + limit_s
        links = [share.link for crossing in crossings for share in crossing.shares]
        with self._watcher.changed:
            while not all(crossing.is_ready() for crossing in crossings):
                if any(link.compiles for link in links):
                    deadline = time.monotonic() + limit_s
                left_s = deadline - time.monotonic()
                if left_s <= 0 or any(link.lost for link in links):
                    return False
                self._watcher.changed.wait(min(left_s, 1.0))
        return True

    def bind(self, crossing: Crossing, args: Sequence[Any] | Mapping[int, Any]) -> None:
        """Make sure that the workers see the parameters and buffers where they are now. The caller holds the lock."""
        for share in crossing.shares:
            tensors = [args[i] for i in share.static_args]
            moved = [tensor.data_ptr() for tensor in tensors] != share.pointers
            if moved or not self._device.holds(share.chunks):
                self._bind(share, tensors)

    def _introduce(self, crossing: Crossing, shares: Sequence[Share], args: Sequence[Any]) -> None:
        self._begin()
        for share in shares:
            share.link.send(m.Load(share.job, share.program))
        self.bind(crossing, args)
        for share in shares:
            share.link.send(share.layout)

    def _bind(self, share: Share, tensors: Sequence[torch.Tensor]) -> None:
        refs = self._device.export(tensors)
        handles = self._device.exported()
        share.link.map_exports({ref.chunk: handles[ref.chunk] for ref in refs})
        wants = {place.index for place in share.layout.grad_inputs}
        statics = [m.Static(i, r, i in wants) for i, r in zip(share.static_inputs, refs, strict=True)]
        share.link.send(m.Bind(share.job, statics))
        share.link.unmap_exports(set(handles))
        share.binds += 1
        self.binds += 1
        share.chunks = tuple({ref.chunk for ref in refs})
        references = [weakref.ref(tensor) for tensor in tensors]
        share.statics = dict(zip(share.static_inputs, references, strict=True))
        share.pointers = [tensor.data_ptr() for tensor in tensors]
