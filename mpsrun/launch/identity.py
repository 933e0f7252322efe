"""Which process is meant: a pid is given out again, a pid with the time of its start is not."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19  # the field of /proc/PID/stat (proc_pid_stat(5): 22), counted from the one after the name


@dataclass(frozen=True)
class Identity:
    """A process for all times: `started` counts clock ticks since `boot`, which no change of the clock moves."""

    pid: int
    started: int
    boot: str

    def __str__(self) -> str:
        return f"{self.pid} {self.started} {self.boot}"

    @classmethod
    def parse(cls, text: str) -> "Identity":
        """Read what `str` wrote; ValueError for anything else."""
        pid, started, boot = text.split()
        return cls(int(pid), int(started), boot)

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        """Return who has this pid now; None where nobody has it, or only a zombie."""
        fields = stat_fields(pid)
        if not fields or fields[0] in "ZX":
            return None
        return cls(pid, int(fields[_STARTED]), _BOOT.read_text().strip())

    def open(self) -> int | None:
        """Return a descriptor of the process (pidfd), for the caller to close; None where it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except (OSError, OverflowError):
            return None
        if Identity.of(self.pid) == self:  # compared after the descriptor holds the process
            return descriptor
        os.close(descriptor)
        return None


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name in parentheses, the state first; none without it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def kill(processes: Iterable[Identity], timeout_s: float) -> None:
    """Kill exactly these processes, whoever's children they are; return when they are gone, or after `timeout_s`."""
    with _opened(processes) as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended, or is another user's now
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _wait(descriptors, timeout_s)


@contextlib.contextmanager
def _opened(processes: Iterable[Identity]) -> Iterator[list[int]]:
    descriptors = [found for process in processes if (found := process.open()) is not None]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _wait(descriptors: Sequence[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    left = set(descriptors)
    while left and (rest_s := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(rest_s * 1000):
            poller.unregister(descriptor)
            left.discard(descriptor)
