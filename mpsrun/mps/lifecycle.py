"""CUDA MPS for one run: join the daemon that is there, or start a private one and end it with the run."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mpsrun.config import Config
from mpsrun.errors import MpsrunError, UsageError
from mpsrun.log import say
from mpsrun.mps.control import CONTROL, LOG_DIRECTORY, PIPE_DIRECTORY
from mpsrun.mps.joining import daemon_to_join
from mpsrun.mps.service import JoinedService, PrivateService, Service
from mpsrun.mps.surroundings import exclusive_process, jetson, multi_instance, prohibited, wsl

# starts the process that owns a private daemon (see guard.py) with a pipe and a log directory
StartGuard = Callable[[Path, Path], "subprocess.Popen[bytes]"]


@contextlib.contextmanager
def cuda_mps(config: Config, has_gpu: bool, no_gpu_reason: str, start_guard: StartGuard) -> Iterator[Service]:
    """Let the processes started inside be clients of a CUDA MPS daemon, as `config.mps` says.

    They learn of it through the environment. A daemon that was there before is joined and left as it was.
    Raises UsageError for `--mps on` where that is impossible; under `auto` one line says why, and the GPU is
    shared by time slices.
    """
    if not has_gpu or not config.worker_count():
        if config.mps == "on":
            _refuse(no_gpu_reason or "serial lanes, which have no use for it")
        yield Service()
    elif config.mps == "off":
        _warn_of_exclusive_mode()
        # a directory without a daemon, or the driver would connect to one in the default place
        with _environment({PIPE_DIRECTORY: str(config.mps_pipe_dir)}):
            yield Service()
    elif shutil.which(CONTROL) is None:
        _decline(config, f"no {CONTROL} on PATH")
        yield Service()
    elif obstacle := wsl() or jetson() or prohibited():
        _decline(config, str(obstacle))
        yield Service()
    elif (joined := daemon_to_join()) is not None:
        _tell(config, f"joined the CUDA MPS daemon in {joined}")
        with _environment({PIPE_DIRECTORY: str(joined)}):
            yield JoinedService(joined)
    elif obstacle := multi_instance():
        _decline(config, str(obstacle))
        yield Service()
    else:
        with _private(config, start_guard) as service:
            yield service


@contextlib.contextmanager
def _private(config: Config, start_guard: StartGuard) -> Iterator[Service]:
    pipe_dir, log_dir = config.mps_pipe_dir, config.mps_log_dir
    pipe_dir.mkdir(mode=0o700)
    log_dir.mkdir(mode=0o700, exist_ok=True)
    service = PrivateService(pipe_dir, log_dir, lambda: start_guard(pipe_dir, log_dir))
    try:
        if _is_ready(config, service):
            _tell(config, f"started a private CUDA MPS daemon in {pipe_dir}")
            with _environment({PIPE_DIRECTORY: str(pipe_dir), LOG_DIRECTORY: str(log_dir)}):
                yield service
        else:
            service.close()
            yield Service()
    finally:
        service.close()


def _is_ready(config: Config, service: PrivateService) -> bool:
    try:
        service.start()
    except MpsrunError as error:
        _decline(config, str(error))
        return False
    return True


def _tell(config: Config, text: str) -> None:
    if config.verbose:
        say(text)


def _decline(config: Config, reason: str) -> None:
    if config.mps == "on":
        _refuse(reason)
    say(f"no CUDA MPS ({reason}): the processes share the GPU by time slices")
    _warn_of_exclusive_mode()


def _warn_of_exclusive_mode() -> None:
    if obstacle := exclusive_process():
        say(f"{obstacle}; the workers will be lost")


def _refuse(reason: str) -> None:
    raise UsageError(
        f"expected an NVIDIA GPU and CUDA MPS for --mps on, found {reason}; fix that, or leave --mps on out"
    )


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
