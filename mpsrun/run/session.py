"""The one coordinator of this process: made when the first region needs it, closed when the process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time

import torch

from mpsrun import config, log
from mpsrun.config import Config
from mpsrun.errors import MpsrunError
from mpsrun.run.coordinator import Coordinator, open_coordinator

END_DEADLINE_S = 5.0

_lock = threading.Lock()
_coordinator: Coordinator | None = None
_reason: str | None = None
_owned = contextlib.ExitStack()


def worker_count() -> int:
    """How many workers this process has or would have."""
    return len(_coordinator.links) if _coordinator is not None else config.current().worker_count()


def coordinator(kind: str) -> Coordinator | None:
    """The coordinator for devices of this kind; None where there can be none, with `why_none()` to tell."""
    global _coordinator, _reason
    with _lock:
        if _coordinator is None and _reason is None:
            try:
                _coordinator = _open(kind)
            except (MpsrunError, ImportError) as error:
                _reason = f"no workers: {error}"
                log.say(_reason)
        if _coordinator is not None and _coordinator.device.kind != kind:
            return None
        return _coordinator


def why_none() -> str:
    """Why `coordinator` returned None."""
    return _reason or "the workers serve another kind of device"


def close() -> None:
    """Stop the workers; the next region that needs them starts new ones."""
    global _coordinator, _reason
    with _lock:
        if _coordinator is not None:
            _coordinator.close()
        _coordinator = _reason = None
        _owned.close()


def _open(kind: str) -> Coordinator:
    settings = config.current()
    if settings.run_dir is None:
        settings = _start_own_workers(settings)
    index = torch.cuda.current_device() if kind == "cuda" else 0
    atexit.register(close)
    os.register_at_fork(after_in_child=_forget)
    return open_coordinator(settings, kind, index, end_worker)


def _start_own_workers(settings: Config) -> Config:
    """Without the launcher this process is the workers' parent."""
    import dataclasses

    from mpsrun.launch.rundir import private_run_dir
    from mpsrun.launch.spawn import spawn_worker

    if threading.current_thread() is not threading.main_thread():
        raise MpsrunError("workers can only be started from the main thread; start the script with mpsrun")
    settings = dataclasses.replace(settings, run_dir=_owned.enter_context(private_run_dir()))
    for index in range(1, settings.worker_count() + 1):
        process = spawn_worker(settings, index, os.getpid())
        _owned.callback(_reap, process)
    log.say(f"without the launcher: started {settings.worker_count()} workers of this process's own")
    return settings


def _reap(process: object) -> None:
    import subprocess

    if isinstance(process, subprocess.Popen):
        try:
            process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_DEADLINE_S)


def _forget() -> None:
    """A forked child has none of the parent's threads, sockets and workers."""
    global _coordinator, _reason
    _coordinator, _reason = None, "this process was forked from the one that has the workers"


def end_worker(pid: int) -> None:
    """End a worker that does not answer, and return when it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        deadline = time.monotonic() + END_DEADLINE_S
        import select

        select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        os.close(descriptor)
