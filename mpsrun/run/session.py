"""The one coordinator of this process: made when the first region needs it, closed when the process ends."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import select
import signal
import threading

import torch

from mpsrun import config, log
from mpsrun.config import Config
from mpsrun.device import open_device
from mpsrun.errors import MpsrunError
from mpsrun.launch.pulse import answer_questions
from mpsrun.launch.rundir import private_run_dir
from mpsrun.launch.workers import Nursery
from mpsrun.mps.control import Control, ControlError, pipe_dir_in_force
from mpsrun.mps.verify import verify
from mpsrun.run import report
from mpsrun.run.coordinator import Coordinator

END_DEADLINE_S = 5.0

_lock = threading.Lock()
_coordinator: Coordinator | None = None
_reason: str | None = None
_owned = contextlib.ExitStack()
_registered = False


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
            except Exception as error:  # noqa: BLE001 - without workers the network still trains
                _owned.close()
                _reason = f"no workers: {error}"
                log.say(_reason)
        if _coordinator is not None and _coordinator.device.kind != kind:
            return None
        return _coordinator


def why_none() -> str:
    """Why `coordinator` returned None."""
    return _reason or "the workers serve another kind of device"


def current() -> Coordinator | None:
    """The coordinator, if one was needed so far."""
    return _coordinator


def close() -> None:
    """Stop the workers; the next region that needs them starts new ones."""
    global _coordinator, _reason
    with _lock:
        if _coordinator is not None:
            if _coordinator.settings.verbose:
                report.print_table(_coordinator.counts())
            with contextlib.suppress(OSError):  # a full disk, a run directory that somebody removed
                _coordinator.settings.closing_marker.touch()
            _coordinator.close()
        _owned.close()
        if _coordinator is not None and config.current().run_dir is None:
            _coordinator.free()  # the workers were ours and have ended, and this process may go on
        _coordinator = _reason = None


def _open(kind: str) -> Coordinator:
    global _registered
    settings = config.current()
    if settings.run_dir is None:
        settings = _start_own_workers(settings)
    answer_questions(config.current())
    if not _registered:
        _registered = True
        atexit.register(close)
        os.register_at_fork(after_in_child=_forget)
    device = open_device(kind, torch.cuda.current_device() if kind == "cuda" else 0)
    return Coordinator(settings, device, end_worker, _tell_mode)


def _start_own_workers(settings: Config) -> Config:
    """Without the launcher this process is the workers' parent."""
    settings = dataclasses.replace(settings, run_dir=_owned.enter_context(private_run_dir()))
    nursery = Nursery(settings, END_DEADLINE_S)
    _owned.callback(nursery.stop)
    nursery.start()
    log.say(f"without the launcher: started {_workers(settings.worker_count())} of this process's own")
    return settings


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _tell_mode(coordinator: Coordinator) -> None:
    """Say in one line which mode runs, once all workers are there; under `--mps on` anything else is an error."""
    pids = [
        os.getpid(),
        *(link.pid for link in coordinator.links if link.pid is not None and link.lost is None),
    ]
    attachment = verify(pids, coordinator.device.kind == "cuda")
    log.say(f"{attachment}, {_workers(len(pids) - 1)}")
    if coordinator.settings.mps == "on" and attachment.mode != "CUDA MPS":
        coordinator.fail(MpsrunError(f"expected CUDA MPS (--mps on), found {attachment}; see the log of its server"))


def _forget() -> None:
    """A forked child has none of the parent's threads, sockets and workers."""
    global _coordinator, _reason
    if _coordinator is not None:
        _coordinator.closed = True
    _coordinator, _reason = None, "this process was forked from the one that has the workers"
    _owned.pop_all()


def end_worker(pid: int) -> None:
    """End a worker that does not answer; returns when it is gone, or after a deadline.

    A client of CUDA MPS that is killed in a running kernel would take the other clients' contexts along, so that its
    server is asked first to let go of it.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if torch.cuda.is_initialized():
            _terminate_client(pid)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll(END_DEADLINE_S * 1000)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _terminate_client(pid: int) -> None:
    control = Control(pipe_dir_in_force(), END_DEADLINE_S)
    try:
        for server in control.server_list():
            if pid in control.client_list(server):
                control.terminate_client(server, pid)
    except ControlError as error:
        log.detail(f"worker {pid} could not be detached from CUDA MPS: {error}")
