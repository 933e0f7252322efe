"""Ending processes that we started: leave them time, ask, let go of their GPU, kill; every wait has a deadline."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence

TERMINATE_S = 2.0
KILL_S = 2.0

Release = Callable[[Sequence[int]], None]  # takes pids away from CUDA MPS, with a deadline


def end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = 0.0, release: Release | None = None) -> None:
    """Give processes `grace_s` to end by themselves, then SIGTERM, then SIGKILL; return once they are reaped.

    Workers drain the GPU on SIGTERM. Of those that do not end, `release` takes the work off the GPU before they are
    killed: a client of CUDA MPS that dies with a running kernel takes the contexts of all clients along. A process
    stopped by SIGSTOP answers no SIGTERM, but SIGKILL.
    """
    left = wait_until(processes, grace_s)
    for process in left:
        process.terminate()
    left = wait_until(left, TERMINATE_S)
    if left and release is not None:
        release([process.pid for process in left])
    for process in left:
        process.kill()
    wait_until(left, KILL_S)


def wait_until(processes: Iterable[subprocess.Popen[bytes]], timeout_s: float) -> list[subprocess.Popen[bytes]]:
    """Wait until the processes have ended, for at most `timeout_s`; return those that have not."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if process.poll() is None]
    poller = select.poll()
    watched = {os.pidfd_open(process.pid): process for process in left}
    try:
        for pidfd in watched:
            poller.register(pidfd, select.POLLIN)
        while left and (rest_s := deadline - time.monotonic()) > 0:
            for pidfd, _ in poller.poll(rest_s * 1000):
                poller.unregister(pidfd)
                watched[pidfd].wait()
            left = [process for process in left if process.poll() is None]
    finally:
        for pidfd in watched:
            os.close(pidfd)
    return left
