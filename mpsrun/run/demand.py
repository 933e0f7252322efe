"""How much of a GPU's multiprocessors the kernels of a branch ask for, from what torch's profiler says of them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mpsrun import log

Trace = Mapping[str, Any]
WARP = 32
# What the driver keeps of each block's shared memory, and the blocks that fit at most (compute capability 8 and 9).
RESERVED_SHARED_BYTES, MOST_BLOCKS = 1024, 32


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
        """The part of the GPU that its blocks fill, from 0 to 1."""
        warps = -(-self.threads // WARP)
        fitting = min(
            MOST_BLOCKS,
            gpu.threads // (warps * WARP),
            gpu.registers // max(1, self.registers * warps * WARP),
            gpu.shared_bytes // (self.shared_bytes + RESERVED_SHARED_BYTES),
        )
        return min(1.0, self.blocks / (gpu.count * max(1, fitting)))


def sm_demand(kernels: Sequence[Kernel], gpu: Multiprocessors) -> float | None:
    """The mean over the time of these kernels; None where there are none."""
    total_us = sum(kernel.us for kernel in kernels)
    return sum(kernel.us * kernel.demand(gpu) for kernel in kernels) / total_us if total_us else None


def kernels_of(trace: Trace) -> list[Kernel]:
    """The kernels of a trace in Chrome's form, as torch's profiler exports it."""
    found = []
    for event in trace.get("traceEvents", ()):
        told = event.get("args", {})
        if event.get("cat") == "kernel" and "grid" in told and "block" in told:
            registers, shared_bytes = told.get("registers per thread", 0), told.get("shared memory", 0)
            found.append(Kernel(prod(told["grid"]), prod(told["block"]), registers, shared_bytes, event["dur"]))
    return found


def measure(run: Callable[[], object]) -> float | None:
    """The demand of what `run` launches, which is waited for; None where the profiler cannot say."""
    trace = _traced(run)
    return None if trace is None else sm_demand(kernels_of(trace), Multiprocessors.of_current())


def kernel_names(run: Callable[[], object]) -> Counter[str] | None:
    """How often each kernel is launched by `run`, which is waited for; None where the profiler cannot say."""
    trace = _traced(run)
    if trace is None:
        return None
    return Counter(event["name"] for event in trace.get("traceEvents", ()) if event.get("cat") == "kernel")


def _traced(run: Callable[[], object]) -> Trace | None:
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory(prefix="mpsrun-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            found: Trace = json.loads(path.read_text())
            return found
    except (RuntimeError, OSError, ValueError) as error:
        _say_why(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None


@functools.cache
def _say_why(reason: str) -> None:
    log.say(f"expected torch's profiler to tell of kernels, found {reason}; their SM demand is left out")
