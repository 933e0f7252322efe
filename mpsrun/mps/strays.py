"""Finds the processes of a CUDA MPS by the pipe directory that they were started with, and ends them."""

import contextlib
from pathlib import Path

import psutil

from mpsrun.mps.control import CONTROL, PIPE_DIRECTORY, SERVER
from mpsrun.mps.identity import strings_of

GUARD_ROLE = "mps-daemon"  # the word on the command line of a guard, see guard.py
_KILL_S = 2.0


def end(pipe_dir: Path, grace_s: float = 0.0) -> None:
    """Kill guard, daemon and servers that were started for `pipe_dir`, the directory of one run alone.

    Where there is a guard, they are left `grace_s` to end in good order. Returns when they are gone, or after two
    seconds more.
    """
    found = _of(pipe_dir)
    if any(GUARD_ROLE in _names(process.pid) for process in found):
        psutil.wait_procs(found, grace_s)
    left = _of(pipe_dir)  # again: a daemon may have started a server meanwhile
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares pid and start time first
    psutil.wait_procs(left, _KILL_S)


def servers(pipe_dir: Path) -> list[psutil.Process]:
    """Return the servers that were started for `pipe_dir`."""
    return [process for process in _of(pipe_dir) if SERVER in _names(process.pid)]


def _of(pipe_dir: Path) -> list[psutil.Process]:
    wanted = f"{PIPE_DIRECTORY}={pipe_dir}"
    found = []
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        if {CONTROL, SERVER, GUARD_ROLE} & _names(pid) and wanted in strings_of(pid, "environ"):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
    return found


def _names(pid: int) -> set[str]:
    """Return the names of program and script, and a guard's role; no name among other programs' arguments."""
    words = strings_of(pid, "cmdline")
    programs = {Path(word).name.strip() for word in words[:2]}
    return programs | ({GUARD_ROLE} & set(words[-3:]))
