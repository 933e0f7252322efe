"""What a test run leaves behind: processes, run directories, sockets, shared memory."""

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pool
import psutil

from mpsrun.launch.rundir import base_dir

DEADLINE_S = 5.0


@dataclass(frozen=True)
class Footprint:
    """What there is now, beyond the shared workers and what they use."""

    processes: frozenset[str]
    run_dirs: frozenset[Path]
    shared_memory: frozenset[str]
    memory_files: int

    @classmethod
    def now(cls) -> "Footprint":
        return cls(_processes(), _run_dirs(), _shared_memory(), _memory_files())

    def grown(self) -> str:
        """What there is now and was not then; empty where nothing is."""
        now = Footprint.now()
        found = [
            f"processes {sorted(now.processes - self.processes)}" if now.processes - self.processes else "",
            f"run directories {sorted(now.run_dirs - self.run_dirs)}" if now.run_dirs - self.run_dirs else "",
            f"in /dev/shm {sorted(now.shared_memory - self.shared_memory)}"
            if now.shared_memory - self.shared_memory
            else "",
            f"{now.memory_files} memfds" if now.memory_files > self.memory_files else "",
        ]
        return ", ".join(filter(None, found))

    def wait_until_gone(self) -> None:
        """Fail where something stays for longer than five seconds."""
        deadline = time.monotonic() + DEADLINE_S
        gc.collect()
        while grown := self.grown():
            assert time.monotonic() < deadline, f"left behind: {grown}"
            time.sleep(0.1)
            gc.collect()


def _processes() -> frozenset[str]:
    ours = pool.pids()
    children = psutil.Process().children(recursive=True)
    return frozenset(_describe(child) for child in children if child.pid not in ours and _lives(child))


def _lives(process: psutil.Process) -> bool:
    """Whether it is there, and nobody else's to end: a CUDA MPS server comes and goes with its control daemon."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and not _is_server_of_a_daemon(process)
    except psutil.NoSuchProcess:
        return False


def _is_server_of_a_daemon(process: psutil.Process) -> bool:
    parent = process.parent()
    names = [Path((p.cmdline() or [""])[0]).name.strip() for p in (process, parent) if p is not None]
    return names == ["nvidia-cuda-mps-server", "nvidia-cuda-mps-control"]


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return f"{process.pid}"


def _run_dirs() -> frozenset[Path]:
    coordinator = pool.current()
    ours = coordinator.settings.run_dir if coordinator is not None else None
    return frozenset(entry for entry in base_dir().iterdir() if entry.is_dir() and entry != ours)


def _shared_memory() -> frozenset[str]:
    """Names in /dev/shm that this process made: torch's carry its pid."""
    marks = ("mpsrun", f"torch_{os.getpid()}_")
    return frozenset(entry.name for entry in Path("/dev/shm").glob("*") if any(mark in entry.name for mark in marks))


def _memory_files() -> int:
    """Memory that this process shares, beside what the shared workers keep for themselves."""
    coordinator = pool.current()
    if coordinator is not None:
        # On a GPU what is shared is the memory of torch's own allocator, which keeps it.
        return len(coordinator.device.exported()) if coordinator.device.kind == "cpu" else 0
    return len({entry.stat().st_ino for entry in Path("/proc/self/fd").iterdir() if _is_memfd(entry)})


def _is_memfd(entry: Path) -> bool:
    try:
        return "memfd:mpsrun" in str(entry.readlink())
    except FileNotFoundError:  # closed meanwhile
        return False
