"""The supervisor: starts the group, says why it failed, makes CUDA MPS sound, and starts the group again."""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mpsrun.config import Config
from mpsrun.errors import MpsrunError
from mpsrun.launch import signals
from mpsrun.launch.failures import poisoned, report
from mpsrun.launch.group import Outcome, run_group
from mpsrun.launch.hardware import Hardware
from mpsrun.launch.keeper import Keeper, keeping
from mpsrun.launch.restarts import environment, is_told, may_restart
from mpsrun.launch.rundir import clear_for_restart, private_run_dir
from mpsrun.launch.spawn import make_log_dir, spawn_guard, spawn_keeper
from mpsrun.launch.target import Target
from mpsrun.log import say
from mpsrun.monitor.sampler import sampling
from mpsrun.mps.lifecycle import cuda_mps
from mpsrun.mps.service import Service

GIVEN_UP = 3  # the exit status of a run whose script mpsrun has ended


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
    with signals.held() as mask, _kept_run_dir() as (run_dir, keeper):
        config = replace(config, run_dir=run_dir)
        make_log_dir(config)
        start_guard = functools.partial(spawn_guard, parent_pid=os.getpid())
        has_gpu = hardware.kind == "nvidia"
        with cuda_mps(config, has_gpu, hardware.reason, start_guard) as mps, sampling(config, has_gpu):
            if config.worker_share is not None and type(mps) is Service:
                say("--worker-share has no effect: CUDA MPS is not in use")
            if hardware.kind == "cpu":
                _tell_without_effect(config, hardware.reason)
            start = functools.partial(run_group, config, target, mps, keeper, mask)
            extra = _shared_cores(config, hardware)
            outcome = start(extra | environment(0, config.max_restarts))
            for count in range(1, config.max_restarts + 1):
                if not may_restart(outcome) or not _renew(config, mps, outcome, target.name, count):
                    break
                outcome = start(extra | environment(count, config.max_restarts))
            _tell_end(config, outcome, target.name)
            return Ending(GIVEN_UP if outcome.returncode is None else outcome.returncode)


def _tell_without_effect(config: Config, reason: str) -> None:
    """Name what was asked for and needs a GPU; on a CPU it is there for trying and testing."""
    if config.lanes in ("streams", "captured"):
        say(f"{reason}: with --lanes {config.lanes} branches run in turn, as in plain PyTorch")
    elif config.lanes == "captured-workers":
        say(f"{reason}: nothing is captured, branches run in worker processes")
    elif config.lanes == "auto" and (config.explain or config.verbose or config.verify):  # else the lead says it
        say(f"{reason}: no plan pays on a CPU; --lanes workers tries lanes there")
    for option, is_given in (
        ("--adapt on", config.adapt == "on"),
        ("--tune-convolutions", config.tune_convolutions),
        ("--channels-last on", config.channels_last == "on" and config.lanes == "auto"),
    ):
        if is_given:
            say(f"{option} has no effect: {reason}")


@contextlib.contextmanager
def _kept_run_dir() -> Iterator[tuple[Path, Keeper]]:
    """Make the run directory, and start who clears it should this process die."""
    with private_run_dir() as run_dir:
        start = functools.partial(spawn_keeper, run_dir, os.getpid())
        with keeping(run_dir, start) as keeper:
            yield run_dir, keeper


def _renew(config: Config, mps: Service, outcome: Outcome, name: str, count: int) -> bool:
    """Say why the group failed and prepare its next start; False where there can be none."""
    say(f"the script failed; starting it again ({count} of {config.max_restarts})\n{report(name, outcome.failures)}")
    try:
        mps.recover(poisoned(outcome.failures))
    except MpsrunError as error:
        say(f"not started again: {error}")
        return False
    clear_for_restart(config)
    return True


def _tell_end(config: Config, outcome: Outcome, name: str) -> None:
    if is_told(outcome, config):
        say(f"the run failed\n{report(name, outcome.failures)}")


def _shared_cores(config: Config, hardware: Hardware) -> dict[str, str]:
    """Where lead and workers compute on the same cores, a thread that waits must not keep its core busy.

    The script's own setting goes first. OpenMP reads it when torch is imported.
    """
    shared = config.lanes == "workers" and hardware.kind != "nvidia" and "OMP_WAIT_POLICY" not in os.environ
    return {"OMP_WAIT_POLICY": "PASSIVE"} if shared else {}
