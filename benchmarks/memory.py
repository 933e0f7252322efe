"""The memory that one engine needs at most, while others stay in memory beside it.

Counted is what torch's allocator has reserved in the lead, private pools of CUDA graphs included, and all that the
worker processes have on the GPU, with their contexts and what they share with the lead. Not counted are the lead's own
context and what the driver keeps of a graph.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mpsrun.monitor import nvml
from mpsrun.run import session

MIB = 1 << 20
WORKER_LIMIT_MIB = 600
LEAD_LIMIT = 1.25  # times what plain eager needs


class Allocator(Protocol):
    """What is in the lead's memory, in bytes: held by tensors, and reserved for them."""

    def tidy(self) -> None:
        """Give back what nobody uses, here and in the workers."""

    def held(self) -> tuple[int, int]:
        """Now."""

    def peak(self, steps: Callable[[], object]) -> tuple[int, int]:
        """The most while these steps run."""


class CudaAllocator:
    """That of torch on the current GPU."""

    def tidy(self) -> None:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        owner = session.current()
        if owner is not None:
            owner.trim()
            owner.counts()  # whoever has answered has given back

    def held(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak(self, steps: Callable[[], object]) -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats()
        steps()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def allocator() -> Allocator | None:
    """The one whose peaks are measured; a CPU has none that would tell."""
    return CudaAllocator() if torch.cuda.is_available() else None


class Meter:
    """Made before an engine is built; what is there already is none of the engine's."""

    def __init__(self, source: Allocator) -> None:
        self._source = source
        source.tidy()
        self._before = source.held()

    def measure(self, steps: Callable[[], object], has_workers: bool) -> dict[str, Any]:
        """MiB at most in these steps, which start with nothing in the allocator's cache."""
        self._source.tidy()
        allocated, reserved = (
            round((most - before) / MIB, 1) for most, before in zip(self._source.peak(steps), self._before, strict=True)
        )
        return {"reserved MiB": reserved, "allocated MiB": allocated} | (_workers() if has_workers else {})


def _workers() -> dict[str, Any]:
    """What the workers have by now; their caches keep what the last steps needed."""
    owner = session.current()
    pids = [link.pid for link in owner.links if link.lost is None] if owner is not None else []
    if owner is None or not pids:
        return {}
    told = nvml.memory_by_pid()
    known = all(told.get(pid) for pid in pids)  # a driver may tell pids of another namespace, or no memory
    found = sum(told[pid] for pid in pids) + owner.arena_bytes // MIB if known else None
    return {"workers": len(pids), "workers MiB": found}


def used_mib(cell: dict[str, Any]) -> float | None:
    """Of lead and workers together; None where it was not measured."""
    memory = cell.get("memory", {})
    if "failed" in cell or "reserved MiB" not in memory or memory.get("workers MiB", 0) is None:
        return None
    return memory["reserved MiB"] + memory.get("workers MiB", 0)


def limit_mib(cells: dict[str, dict[str, Any]], engine: str) -> float | None:
    """What an engine may use beside plain eager; None where eager was not measured."""
    plain = used_mib(cells.get("eager", {}))
    if plain is None:
        return None
    return LEAD_LIMIT * plain + WORKER_LIMIT_MIB * cells.get(engine, {}).get("memory", {}).get("workers", 0)
