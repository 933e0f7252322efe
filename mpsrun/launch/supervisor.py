"""The supervisor: parent of lead, workers and a private CUDA MPS daemon, from their start to their end."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpsrun.config import Config
from mpsrun.launch import signals
from mpsrun.launch.ending import end
from mpsrun.launch.hardware import Hardware
from mpsrun.launch.rundir import private_run_dir
from mpsrun.launch.spawn import make_log_dir, spawn_guard, spawn_lead, spawn_worker
from mpsrun.launch.target import Target
from mpsrun.log import say
from mpsrun.monitor.sampler import sampling
from mpsrun.mps.lifecycle import cuda_mps

_GRACE_S = 1.0  # for workers which the lead has told to end
_LOOK_AGAIN_S = 5.0  # children announce their ends; this is for an announcement that got lost


@dataclass(frozen=True)
class Ending:
    """How the lead ended: an exit status, or minus the signal that killed it."""

    returncode: int

    def follow(self) -> int:
        """End as the lead did: die by its signal, or return its exit status."""
        if self.returncode >= 0:
            return self.returncode
        signals.die_by(-self.returncode)
        return 128 - self.returncode


def supervise(config: Config, target: Target, hardware: Hardware) -> Ending:
    """Run the script in a lead, with workers beside it; everything started here has ended on return."""
    with signals.held() as mask, private_run_dir() as run_dir:
        config = replace(config, run_dir=run_dir)
        make_log_dir(config)
        start_guard = functools.partial(spawn_guard, parent_pid=os.getpid())
        mps = cuda_mps(config, hardware.kind == "nvidia", hardware.reason, start_guard)
        with mps, sampling(config), _workers(config) as workers:
            if early := signal.sigpending() & signals.ENDING:
                return Ending(-min(early))
            lead = spawn_lead(config, target, os.getpid(), mask, _shared_cores(config, hardware))
            try:
                return watch(lead, workers)
            finally:
                end([lead])


def _shared_cores(config: Config, hardware: Hardware) -> dict[str, str]:
    """Where lead and workers compute on the same cores, a thread that waits must not keep its core busy.

    The script's own setting goes first. OpenMP reads it when torch is imported.
    """
    shared = config.lanes == "workers" and hardware.kind != "nvidia"
    return {"OMP_WAIT_POLICY": "PASSIVE"} if shared else {}


def watch(lead: subprocess.Popen[bytes], workers: Sequence["Worker"]) -> Ending:
    """Pass on signals until the lead has ended."""
    while lead.poll() is None:
        try:
            stopped = os.waitid(os.P_PID, lead.pid, os.WSTOPPED | os.WNOHANG)
        except ChildProcessError:  # it ended just now
            continue
        if stopped is not None:
            signals.stop_with(stopped.si_status)
        for worker in workers:
            worker.tell_end()
        info = signal.sigtimedwait(signals.WATCHED, _LOOK_AGAIN_S)
        if info is None:
            continue
        if signals.is_for_lead(info, lead.pid) or (info.si_signo == signal.SIGCONT and _is_stopped(lead.pid)):
            lead.send_signal(info.si_signo)
    return Ending(lead.returncode)


class Worker:
    """A worker process as its parent sees it."""

    def __init__(self, config: Config, index: int) -> None:
        self.index = index
        self.log = config.worker_log(index)
        self.process = spawn_worker(config, index, os.getpid())
        self._told = False

    def tell_end(self) -> None:
        """Say once that the worker ended before the lead, unless the lead told it to."""
        status = self.process.poll()
        if self._told or not status:
            return
        self._told = True
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        name = f"worker {self.index} (pid {self.process.pid})"
        say(f"{name} {how}; last line of {self.log}: {self._last_line()}")

    def _last_line(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")


@contextlib.contextmanager
def _workers(config: Config) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for index in range(1, config.worker_count() + 1):
            worker = Worker(config, index)
            workers.append(worker)  # one by one: those that run are ended where the next one fails to start
        yield workers
    finally:
        end([worker.process for worker in workers], _GRACE_S if config.capture_marker.exists() else 0.0)


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped: the field of /proc/PID/stat after the name in parentheses."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a file of the kernel
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
