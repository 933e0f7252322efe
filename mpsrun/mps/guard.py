"""The guard: parent of a private CUDA MPS daemon, which ends with it in whatever way the launcher ends.

`python -m mpsrun mps-daemon PIPE_DIR`: starts `nvidia-cuda-mps-control -f` with the directories in its
environment, and waits. SIGTERM comes from the launcher when the run is over, and from the kernel when the
launcher has died; then the daemon is asked to quit, and what is left of it and of the servers it started is
killed.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from mpsrun.mps.control import CONTROL, Control, ControlError

DEATH_SIGNAL = signal.SIGTERM
QUIT_S = 1.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_KILL_S = 1.0
_WATCHED = frozenset({signal.SIGTERM, signal.SIGCHLD})


def main(args: Sequence[str]) -> int:
    """Run the daemon until told to end it; returns 0, or 1 where the daemon ended by itself."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())  # SIGTERM is taken when it suits us
    daemon = _start()
    while daemon.poll() is None and signal.sigwait(_WATCHED) != signal.SIGTERM:
        pass
    ended_early = daemon.poll() is not None
    _end(daemon, Control(Path(args[0]), deadline_s=QUIT_S))
    return 1 if ended_early else 0


def _start() -> subprocess.Popen[bytes]:
    """Start the daemon, with the signals that we block, and for every GPU.

    With a selection in CUDA_VISIBLE_DEVICES it would number the selected GPUs from 0, and its clients, which
    have the same selection, would select a second time.
    """
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # should this process be killed
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return subprocess.Popen(
        [CONTROL, "-f"],
        stdin=subprocess.DEVNULL,
        env=environ,
        preexec_fn=prepare,  # noqa: PLW1509 - there is one thread
    )


def _end(daemon: subprocess.Popen[bytes], control: Control) -> None:
    servers = _descendants(daemon.pid)
    try:
        control.quit()
        daemon.wait(QUIT_S)
    except (ControlError, subprocess.TimeoutExpired):
        servers += _descendants(daemon.pid)
        daemon.kill()
        daemon.wait()
    _, left = psutil.wait_procs(servers, timeout=_KILL_S)
    for server in left:
        try:
            server.kill()  # psutil compares pid and start time first
        except psutil.NoSuchProcess:
            continue


def _descendants(pid: int) -> list[psutil.Process]:
    """Return the servers that the daemon started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
