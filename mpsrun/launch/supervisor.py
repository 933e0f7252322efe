"""The supervisor: parent of lead, workers and a private CUDA MPS daemon, from their start to their end."""

import functools
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpsrun.config import Config
from mpsrun.launch import signals
from mpsrun.launch.ending import end
from mpsrun.launch.hardware import Hardware
from mpsrun.launch.rundir import private_run_dir
from mpsrun.launch.spawn import make_log_dir, spawn_guard, spawn_lead
from mpsrun.launch.target import Target
from mpsrun.launch.workers import Worker, look_at, workers_of
from mpsrun.log import say
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
        with mps, workers_of(config, say, lambda: _GRACE_S if config.capture_marker.exists() else 0.0) as workers:
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


def watch(lead: subprocess.Popen[bytes], workers: Sequence[Worker]) -> Ending:
    """Pass on signals, and start workers again, until the lead has ended."""
    while lead.poll() is None:
        try:
            stopped = os.waitid(os.P_PID, lead.pid, os.WSTOPPED | os.WNOHANG)
        except ChildProcessError:  # it ended just now
            continue
        if stopped is not None:
            signals.stop_with(stopped.si_status)
        info = signal.sigtimedwait(signals.WATCHED, look_at(workers, _LOOK_AGAIN_S))
        if info is None:
            continue
        if signals.is_for_lead(info, lead.pid) or (info.si_signo == signal.SIGCONT and _is_stopped(lead.pid)):
            lead.send_signal(info.si_signo)
    return Ending(lead.returncode)


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped: the field of /proc/PID/stat after the name in parentheses."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a file of the kernel
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
