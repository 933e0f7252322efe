"""A client of `nvidia-cuda-mps-control`: one command at a time, each with a deadline.

Commands and answers: https://docs.nvidia.com/deploy/mps/appendix-tools-and-interface-reference.html. Only the
documented answer counts as success; the program exits with 0 after many failures too.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpsrun.errors import MpsrunError

CONTROL = "nvidia-cuda-mps-control"
SERVER = "nvidia-cuda-mps-server"
PIPE_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY"
LOG_DIRECTORY = "CUDA_MPS_LOG_DIRECTORY"
ACTIVE_THREAD_PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
DEFAULT_PIPE_DIR = Path("/tmp/nvidia-mps")  # noqa: S108 - the driver's own choice
DEADLINE_S = 5.0
_POLL_S = 0.01

_one_at_a_time = threading.Lock()


class ControlError(MpsrunError):
    """The control program is missing, did not answer in time, or answered something undocumented."""


@dataclass(frozen=True)
class Control:
    """The control daemon that listens in `pipe_dir`. Every method raises ControlError but on success."""

    pipe_dir: Path
    deadline_s: float = DEADLINE_S

    def server_list(self) -> list[int]:
        """Return the pids of the servers; none runs until the first client has come."""
        return self._pids("get_server_list")

    def client_list(self, server_pid: int) -> list[int]:
        """Return the pids of a server's clients."""
        return self._pids(f"get_client_list {server_pid}")

    def server_status(self, server_pid: int) -> str:
        """Return what the daemon says of a server, as ACTIVE or FAULT."""
        return self.send(f"get_server_status {server_pid}").upper()

    def terminate_client(self, server_pid: int, client_pid: int) -> None:
        """End a client's work on the GPU without harm to the server's other clients. Success is silent."""
        self._silent(f"terminate_client {server_pid} {client_pid}")

    def share_percent(self, server_pid: int) -> float:
        """Return the percentage of the SMs that clients of a server get."""
        return self._number(f"get_active_thread_percentage {server_pid}")

    def set_default_share(self, percent: int) -> None:
        """Give clients of servers to come so much of the SMs; success is that the daemon names it afterwards."""
        self._set(f"set_default_active_thread_percentage {percent}")
        found = self._number("get_default_active_thread_percentage")
        if found != percent:
            raise ControlError(f"expected a default share of {percent} % after setting it, found {found:g} %")

    def set_default_memory_limit(self, device: int, limit: str) -> None:
        """Limit the device memory of each client of servers to come, as `8G` or `512M`; checked as above."""
        self._set(f"set_default_device_pinned_mem_limit {device} {limit}")
        found = self.send(f"get_default_device_pinned_mem_limit {device}")
        if _size_bytes(found) != _size_bytes(limit):
            raise ControlError(f"expected a memory limit of {limit} on device {device}, found {_short(found)}")

    def quit(self) -> None:
        """Ask the daemon and its servers to end. Success is silent, and they may still be ending."""
        self._silent("quit")

    def is_reachable(self) -> bool:
        """Return whether a daemon answers."""
        try:
            self.server_list()
        except ControlError:
            return False
        return True

    def send(self, command: str) -> str:
        """Send one command; return what the control program printed, stripped."""
        program = shutil.which(CONTROL)
        if program is None:
            raise ControlError(f"expected {CONTROL} on PATH, found none; install the NVIDIA driver's compute tools")
        with _one_at_a_time, self._turn():
            return self._send(program, command)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep other processes of mpsrun from asking meanwhile: a lock on the pipe directory, which leaves no file.

        Where somebody holds it for longer than a command may take, or it cannot be had, we ask all the same.
        """
        try:
            lock = os.open(self.pipe_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # no such directory: the control program says so better
            yield
            return
        deadline = time.monotonic() + self.deadline_s
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(lock)

    def _send(self, program: str, command: str) -> str:
        process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, PIPE_DIRECTORY: str(self.pipe_dir)},
            process_group=0,
        )
        with process:
            try:
                answer, _ = process.communicate(f"{command}\n".encode(), self.deadline_s)
            except subprocess.TimeoutExpired:
                raise ControlError(
                    f"expected an answer to {command!r} within {self.deadline_s:g} s, found none"
                ) from None
            finally:
                process.kill()
        text = answer.decode(errors="replace").strip()
        if process.returncode != 0:
            raise ControlError(f"expected {command!r} to succeed, found status {process.returncode}: {_short(text)}")
        return text

    def _pids(self, command: str) -> list[int]:
        words = self.send(command).split()
        if not all(word.isascii() and word.isdigit() for word in words):
            raise ControlError(f"expected pids in answer to {command!r}, found {_short(' '.join(words))}")
        return [int(word) for word in words]

    def _number(self, command: str) -> float:
        text = self.send(command)
        try:
            return float(text)
        except ValueError:
            raise ControlError(f"expected a number in answer to {command!r}, found {_short(text)}") from None

    def _set(self, command: str) -> None:
        """Send a command whose success is silent or repeats the value, by version of the driver."""
        text = self.send(command)
        if text and _size_bytes(text) != _size_bytes(command.rsplit(maxsplit=1)[-1]):
            raise ControlError(f"expected no answer to {command!r}, found {_short(text)}")

    def _silent(self, command: str) -> None:
        if text := self.send(command):
            raise ControlError(f"expected no answer to {command!r}, found {_short(text)}")


def pipe_dir_in_force() -> Path:
    """Return the pipe directory that CUDA programs started from here use."""
    return Path(os.environ.get(PIPE_DIRECTORY) or DEFAULT_PIPE_DIR)


def _size_bytes(text: str) -> float | None:
    """Return what `8G`, `512M`, `1024` or `50.0` means; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip().upper())
    return float(match[1]) * 1024.0 ** " KMGT".index(match[2] or " ") if match else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}…")
