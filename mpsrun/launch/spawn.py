"""How the lead and the workers are started: command line, environment, standard streams, process group."""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from mpsrun.checkout import with_package
from mpsrun.config import Config
from mpsrun.errors import UsageError
from mpsrun.launch.family import parent_env
from mpsrun.launch.python_flags import python_flags
from mpsrun.launch.target import Target
from mpsrun.mps.control import ACTIVE_THREAD_PERCENTAGE, LOG_DIRECTORY, PIPE_DIRECTORY
from mpsrun.mps.service import GUARD_LOG


def spawn_worker(config: Config, index: int, parent_pid: int, generation: int = 0) -> subprocess.Popen[bytes]:
    """Start worker `index` (from 1), which dies with the process `parent_pid`, its caller.

    Call it from a thread that lasts: the worker ends when the thread that started it ends. It gets a process
    group of its own, so that the terminal's Ctrl-C and Ctrl-Z reach the lead only, and writes to
    `config.worker_log(index)`. `generation`: how many processes had this index before. Its share of the GPU under CUDA
    MPS is fixed from its start on; nobody else's is touched.
    """
    role = ["worker", str(index), *([str(generation)] if generation else [])]
    share = {} if config.worker_share is None else {ACTIVE_THREAD_PERCENTAGE: str(config.worker_share)}
    with config.worker_log(index).open("ab", buffering=0) as log:
        return _spawn_own(role, log, os.environ | config.to_env() | share, parent_pid)


def spawn_lead(
    config: Config,
    target: Target,
    parent_pid: int,
    mask: Collection[int] = (),
    extra: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start the lead, which runs the user's script with our streams, process group and Python flags.

    `mask`: the signals blocked when the launcher was started, which the lead restores. `extra`: more variables for
    its environment. Descriptors that the shell handed to the launcher, as for `<(...)`, are handed on.
    """
    return subprocess.Popen(
        [sys.executable, *python_flags(), "-m", "mpsrun", "lead", *target.to_argv()],
        env={**os.environ, **(extra or {}), **config.to_env(), **parent_env(parent_pid, mask)},
        close_fds=False,
    )


def spawn_guard(pipe_dir: Path, log_dir: Path, parent_pid: int) -> subprocess.Popen[bytes]:
    """Start the process that owns a private CUDA MPS daemon, and ends it on SIGTERM or when we die."""
    directories = {PIPE_DIRECTORY: str(pipe_dir), LOG_DIRECTORY: str(log_dir)}
    with (log_dir / GUARD_LOG).open("ab", buffering=0) as log:
        return _spawn_own(["mps-daemon", str(pipe_dir)], log, os.environ | directories, parent_pid)


def spawn_keeper(run_dir: Path, parent_pid: int) -> subprocess.Popen[bytes]:
    """Start the process that clears up after us; the other end of its stdin is ours alone (see keeper.py)."""
    return _spawn_own(["keeper", str(run_dir)], subprocess.DEVNULL, os.environ, parent_pid, subprocess.PIPE)


def run_plain(config: Config, target: Target) -> None:
    """Become `python script args`; does not return."""
    os.environ.update(config.to_env())
    os.execv(sys.executable, [sys.executable, *python_flags(), *target.to_argv()])  # noqa: S606


def make_log_dir(config: Config) -> None:
    """Make `--log-dir`; UsageError where that is impossible."""
    if config.log_dir is None:
        return
    try:
        config.log_dir.mkdir(parents=True, exist_ok=True)
        config.worker_log(1).open("ab").close()
    except OSError as error:
        raise UsageError(
            f"expected --log-dir to be a directory that can be written, found {config.log_dir}: "
            f"{error.strerror}; name another one"
        ) from None


def _spawn_own(
    role: Sequence[str],
    log: IO[bytes] | int,
    environ: Mapping[str, str],
    parent_pid: int,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a process that runs none of the user's code, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mpsrun", *role],  # -P: the user's files must not hide what it imports
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=with_package({**environ, **parent_env(parent_pid)}),
        process_group=0,
        bufsize=0,
    )
