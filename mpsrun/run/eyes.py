"""What the lead knows of the GPU's load: the monitor's samples as readings, and the trace of what became of them."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING

import torch

from mpsrun import config, log
from mpsrun.monitor.page import Reader
from mpsrun.monitor.trace import Decided, Line, Stepped, Trace
from mpsrun.plan.adapt import Now
from mpsrun.plan.load import Reading

if TYPE_CHECKING:
    from mpsrun.monitor.sample import Sample

STALE_S = 5.0  # a sample that is older says nothing of now


class Eyes:
    """One a process. `seen` counts the samples, so that each network takes each of them once."""

    def __init__(self, kind: str) -> None:
        settings = config.current()
        self.adapts = settings.adapt == "on" or (settings.adapt == "auto" and kind == "cuda")
        self._trace = Trace(settings.trace) if settings.trace is not None else None
        self._reader: Reader | None = None
        self._reading = Reading()
        self._seen = 0
        if settings.run_dir is None:
            if self.adapts:
                log.detail("without the launcher there is no monitor: plans adapt by step times alone")
        elif self.adapts or self._trace is not None:
            self._reader = Reader(settings.sample_page)
            with contextlib.suppress(OSError):  # a full disk: nobody watches then
                settings.watched_gpu.write_text(_name_of_gpu(kind))

    @property
    def has_monitor(self) -> bool:
        """Whether plans adapt to what the launcher's monitor sees."""
        return self.adapts and self._reader is not None

    @property
    def is_tracing(self) -> bool:
        return self._trace is not None

    def now(self, seen: int) -> tuple[Now, int]:
        """The time, with a reading if there is one after number `seen`; and the number of the latest."""
        sample = self._reader.fresh() if self._reader is not None else None
        now_s = time.monotonic()
        if sample is not None and now_s - sample.at_s < STALE_S:
            self._reading, self._seen = reading_of(sample), self._seen + 1
        return Now(now_s, self._reading if seen != self._seen else None), self._seen

    def stepped(self, graph: str, plan: str, us: float) -> None:
        """Note a step in the trace."""
        self._note(Stepped(time.monotonic(), graph, plan, us))

    def decided(self, graph: str, plan: str, line: str) -> None:
        """Note a decision in the trace."""
        self._note(Decided(time.monotonic(), graph, plan, line))

    def _note(self, line: Line) -> None:
        if self._trace is not None:
            self._trace.add(line)


@functools.cache
def eyes(kind: str) -> Eyes:
    """The eyes of this process, which computes on devices of this kind."""
    return Eyes(kind)


def reading_of(sample: Sample) -> Reading:
    """What a sample says of the load."""
    free_mib = None
    if sample.memory_used_mib is not None and sample.memory_total_mib is not None:
        free_mib = sample.memory_total_mib - sample.memory_used_mib
    tenants = sample.tenants
    return Reading(
        tenants=frozenset(tenant.pid for tenant in tenants) if tenants is not None else None,
        tenants_mib=sum(tenant.memory_mib or 0 for tenant in tenants) if tenants is not None else None,
        slowed_by=sample.slowed_by,
        free_mib=free_mib,
        total_mib=sample.memory_total_mib,
        sm_percent=sample.sm_percent,
        dram_percent=sample.dram_percent,
    )


def _name_of_gpu(kind: str) -> str:
    """The UUID by which NVML knows the current GPU; `cpu` where there is none."""
    if kind != "cuda":
        return "cpu"
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
