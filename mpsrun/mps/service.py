"""The CUDA MPS of a run as its launcher sees it: what became of it, and how it is made sound again.

`Service` is a run without CUDA MPS. A joined daemon belongs to somebody else: it is asked, never ended. A private one
is started again where a client's fault may have harmed its server.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from mpsrun.errors import MpsrunError
from mpsrun.log import last_line
from mpsrun.mps import strays
from mpsrun.mps.control import Control, ControlError

START_S = 15.0
STOP_S = 4.5  # longer than the guard's own deadlines
RELEASE_S = 2.0
SOUND_S = 20.0  # a server's clients have ended before; it then makes new contexts
GUARD_LOG = "mps-daemon.log"
_POLL_S = 0.02
_LOOK_S = 1.0
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


class Service:
    """No CUDA MPS: nothing can fail, and nothing is to be done."""

    log: Path | None = None

    def lost(self) -> list[tuple[str, int]]:
        """Return what has ended since the last call, as ("CUDA MPS server", pid)."""
        return []

    def release(self, pids: Sequence[int]) -> None:
        """Take the work of these clients off the GPU, so that their end harms no other client."""

    def recover(self, poisoned: bool) -> None:
        """Return when new clients can be served; our own have ended. `poisoned`: a client's context was lost.

        Raises MpsrunError where that cannot be had.
        """

    def close(self) -> None:
        """End what is ours."""


class JoinedService(Service):
    """A daemon that was there before this run."""

    def __init__(self, pipe_dir: Path) -> None:
        self._pipe_dir = pipe_dir

    def release(self, pids: Sequence[int]) -> None:
        terminate_clients(self._pipe_dir, pids)

    def recover(self, poisoned: bool) -> None:  # noqa: ARG002 - it recovers by itself, or not at all
        deadline = time.monotonic() + SOUND_S
        while reason := unsound(self._pipe_dir):
            if time.monotonic() > deadline or ending_is_pending():
                raise MpsrunError(
                    f"expected the CUDA MPS in {self._pipe_dir} to take clients again within {SOUND_S:g} s, "
                    f"found: {reason}; end its other clients, or have its owner start it anew"
                )
            time.sleep(0.2)


class PrivateService(Service):
    """A daemon of this run alone. start_guard: starts the process that owns it (see guard.py)."""

    def __init__(self, pipe_dir: Path, log_dir: Path, start_guard: "Callable[[], subprocess.Popen[bytes]]") -> None:
        self.log = log_dir / "server.log"
        self._pipe_dir = pipe_dir
        self._log_dir = log_dir
        self._start_guard = start_guard
        self._guard: subprocess.Popen[bytes] | None = None
        self._servers: dict[int, psutil.Process] = {}
        self._looked_s = 0.0

    def start(self) -> None:
        """Start the daemon. Raises MpsrunError where it does not answer."""
        self._guard = self._start_guard()
        wait_ready(self._guard, Control(self._pipe_dir, deadline_s=2.0), self._log_dir)

    def lost(self) -> list[tuple[str, int]]:
        found = [("CUDA MPS server", pid) for pid in self._ended_servers()]
        if self._guard is not None and self._guard.poll() is not None:
            found.append(("CUDA MPS daemon", self._guard.pid))
            self._guard = None
        return found

    def release(self, pids: Sequence[int]) -> None:
        terminate_clients(self._pipe_dir, pids)

    def recover(self, poisoned: bool) -> None:
        if poisoned or self._guard is None or unsound(self._pipe_dir):
            self.close()
            self.start()

    def close(self) -> None:
        if self._guard is not None:
            stop_guard(self._guard)
            self._guard = None
        strays.end(self._pipe_dir)
        self._servers.clear()
        for left in self._pipe_dir.glob("*"):
            with contextlib.suppress(OSError):
                left.unlink()

    def _ended_servers(self) -> list[int]:
        """Return the servers that have ended; new ones are looked for once a second, which reads all of /proc."""
        ended = [pid for pid, server in self._servers.items() if not _lives(server)]
        for pid in ended:
            del self._servers[pid]
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._looked_s = time.monotonic()
            self._servers |= {server.pid: server for server in strays.servers(self._pipe_dir)}
        return ended


def terminate_clients(pipe_dir: Path, pids: Sequence[int]) -> None:
    """Have the servers let go of these clients, in at most RELEASE_S in all; what cannot be had is left."""
    deadline = time.monotonic() + RELEASE_S

    def control() -> Control:
        return Control(pipe_dir, max(0.1, deadline - time.monotonic()))

    try:
        for server in control().server_list():
            for pid in set(control().client_list(server)) & set(pids):
                control().terminate_client(server, pid)
                if time.monotonic() > deadline:
                    return
    except ControlError:  # no daemon any more, or one that is stuck: the clients are killed all the same
        return


def unsound(pipe_dir: Path) -> str:
    """Say why the daemon cannot serve new clients; empty where it can."""
    control = Control(pipe_dir, deadline_s=2.0)
    try:
        faulty = [pid for pid in control.server_list() if "FAULT" in control.server_status(pid)]
    except ControlError as error:
        return str(error)
    return f"server {faulty[0]} waits for the clients that a fault has ended (FAULT)" if faulty else ""


def wait_ready(guard: "subprocess.Popen[bytes]", control: Control, log_dir: Path) -> None:
    """Wait until the daemon answers. Raises MpsrunError where it ends, or does not answer within START_S.

    Somebody who wants the run to end (a signal that the launcher holds) is not kept waiting.
    """
    deadline = time.monotonic() + START_S
    while not control.is_reachable():
        if guard.poll() is not None:
            raise MpsrunError(f"the CUDA MPS daemon ended at its start: {last_line(log_dir / GUARD_LOG)}")
        if time.monotonic() > deadline:
            raise MpsrunError(f"the CUDA MPS daemon did not answer within {START_S:g} s")
        if ending_is_pending():
            raise MpsrunError("the run was ended before the CUDA MPS daemon answered")
        time.sleep(_POLL_S)


def stop_guard(guard: "subprocess.Popen[bytes]") -> None:
    """End a private daemon, its servers and the guard."""
    guard.terminate()
    try:
        guard.wait(STOP_S)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


def ending_is_pending() -> bool:
    """Return whether a signal to end the run waits to be taken."""
    return bool(signal.sigpending() & _ENDING)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
