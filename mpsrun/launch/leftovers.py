"""What a run whose launcher is dead may have left: processes, CUDA MPS, shared memory, its directory.

The launcher notes each process that it starts in the file `processes` of the run directory. The keeper reads it
when the launcher dies (keeper.py), and the next start for the directories that no keeper has cleared.
"""

import os
import shutil
from pathlib import Path

from mpsrun.config import Config
from mpsrun.launch.identity import kill
from mpsrun.mps import strays
from mpsrun.mps.identity import Identity

RECORD = "processes"
KILL_S = 2.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's place for it


def note(run_dir: Path, pid: int) -> None:
    """Note a process that this run has started."""
    identity = Identity.of(pid)
    if identity is None:  # it has ended already
        return
    try:
        descriptor = os.open(run_dir / RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as record:
            record.write(f"{identity}\n")
    except OSError:  # a full disk must not keep a run from starting; the parent-death signal is there, too
        return


def end_processes(run_dir: Path) -> None:
    """Kill what the run has started and still lives."""
    processes = noted(run_dir)
    kill(processes, KILL_S)
    for process in processes:
        _remove_shared_memory(process)


def clear(run_dir: Path, mps_grace_s: float = 0.0) -> None:
    """End the processes and the CUDA MPS of a run that nobody owns any more, and remove its directory."""
    end_processes(run_dir)
    strays.end(Config(run_dir=run_dir).mps_pipe_dir, mps_grace_s)
    shutil.rmtree(run_dir, ignore_errors=True)


def noted(run_dir: Path) -> list[Identity]:
    """Return the processes that were noted; lines that were cut short by a full disk are left out."""
    try:
        lines = (run_dir / RECORD).read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Identity.parse(line))
        except ValueError:
            continue
    return found


def _remove_shared_memory(process: Identity) -> None:
    """Remove what torch shared by name for a process that has ended; its files carry its pid."""
    if Identity.of(process.pid) is not None:  # it lives, or another process has its number by now
        return
    for path in _SHARED_MEMORY.glob(f"torch_{process.pid}_*"):
        try:
            if path.lstat().st_uid == os.getuid():
                path.unlink()
        except OSError:  # gone meanwhile
            continue
