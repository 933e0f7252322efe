"""How long kernels run and how much of a GPU's multiprocessors they fill, from what torch's profiler says of them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mpsrun import log
from mpsrun.errors import in_a_line
from mpsrun.run.recorder import alone, settle

Trace = Mapping[str, Any]
WARP = 32
# What the driver keeps of each block's shared memory, and the blocks that fit at most (compute capability 8 and 9).
RESERVED_SHARED_BYTES, MOST_BLOCKS = 1024, 32
MARKER = "spin_kernel"  # that of `torch.cuda._sleep`


@dataclass(frozen=True)
class Multiprocessors:
    """Those of a GPU: how many, and what each of them holds."""

    count: int
    threads: int
    registers: int
    shared_bytes: int

    @classmethod
    def of_current(cls) -> Multiprocessors:
        """Those of the current GPU."""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            found.multi_processor_count,
            found.max_threads_per_multi_processor,
            found.regs_per_multiprocessor,  # type: ignore[attr-defined]  # missing in torch's stubs
            found.shared_memory_per_multiprocessor,
        )


@dataclass(frozen=True)
class Kernel:
    """A launch: blocks, threads and shared memory of each, registers of each thread, microseconds."""

    blocks: int
    threads: int
    registers: int
    shared_bytes: int
    us: float

    def demand(self, gpu: Multiprocessors) -> float:
        """The part of the GPU that its blocks fill on average, from 0 to 1; the last wave of them may fill little."""
        warps = -(-self.threads // WARP)
        fitting = min(
            MOST_BLOCKS,
            gpu.threads // (warps * WARP),
            gpu.registers // max(1, self.registers * warps * WARP),
            gpu.shared_bytes // (self.shared_bytes + RESERVED_SHARED_BYTES),
        )
        waves = self.blocks / (gpu.count * max(1, fitting))
        return waves / max(1, ceil(waves))


@dataclass(frozen=True)
class Demand:
    """What kernels take of a GPU that run one after the other.

    kernel_us: how long they run. full_us: how long they would, were all multiprocessors full of their blocks.
    """

    kernel_us: float
    full_us: float

    @classmethod
    def of(cls, kernels: Sequence[Kernel], gpu: Multiprocessors) -> Demand:
        return cls(sum(kernel.us for kernel in kernels), sum(kernel.us * kernel.demand(gpu) for kernel in kernels))

    @property
    def share(self) -> float | None:
        """The part of the multiprocessors that they fill, from 0 to 1, by time; None where there are no kernels."""
        return self.full_us / self.kernel_us if self.kernel_us else None


def kernels_of(trace: Trace) -> list[list[Kernel]]:
    """The kernels between each two markers of a trace in Chrome's form, as torch's profiler exports it."""
    runs: list[list[Kernel]] = []
    for event in sorted((e for e in trace.get("traceEvents", ()) if e.get("cat") == "kernel"), key=lambda e: e["ts"]):
        told = event.get("args", {})
        if MARKER in event["name"]:
            runs.append([])
        elif runs and "grid" in told and "block" in told:
            registers, shared_bytes = told.get("registers per thread", 0), told.get("shared memory", 0)
            kernel = Kernel(prod(told["grid"]), prod(told["block"]), registers, shared_bytes, event["dur"])
            runs[-1].append(kernel)
    return runs


def measure(runs: Iterable[Callable[[], object]]) -> list[Demand] | None:
    """The demand of what each of `runs` launches, which is waited for; None where the profiler cannot say.

    All of them share one start of the profiler, which takes far longer than they do. What is launched to make the next
    one counts for none.
    """
    count = 0

    def marked() -> None:
        nonlocal count
        for run in runs:
            _mark()
            run()
            _mark()
            count += 1

    trace = _traced(marked)
    if trace is None:
        return None
    found = kernels_of(trace)[::2]
    if len(found) != count:
        _say_why(f"{len(found)} runs in its trace of {count}")
        return None
    gpu = Multiprocessors.of_current()
    return [Demand.of(kernels, gpu) for kernels in found]


def kernel_names(run: Callable[[], object]) -> Counter[str] | None:
    """How often each kernel is launched by `run`, which is waited for; None where the profiler cannot say."""
    trace = _traced(run)
    if trace is None:
        return None
    return Counter(event["name"] for event in trace.get("traceEvents", ()) if event.get("cat") == "kernel")


def _traced(run: Callable[[], object]) -> Trace | None:
    try:
        profiler = profile(activities=[ProfilerActivity.CUDA])
        profiler.start()
        try:
            run()
            settle()
        finally:
            with alone():  # it waits for the device, too
                profiler.stop()
        with tempfile.TemporaryDirectory(prefix="mpsrun-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            found: Trace = json.loads(path.read_text())
            return found
    except (RuntimeError, OSError, ValueError) as error:
        _say_why(in_a_line(error))
        return None


def _mark() -> None:
    """A kernel that no run has, with nothing under way on any stream before or after it."""
    settle()
    torch.cuda._sleep(1)
    settle()


@functools.cache
def _say_why(reason: str) -> None:
    log.say(f"expected torch's profiler to tell of kernels, found {reason}; their SM demand is left out")
