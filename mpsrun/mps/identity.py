"""Which process is meant: a pid is given out again, a pid with the time of its start is not."""

import os
import signal
from pathlib import Path

import msgspec

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19  # the field of /proc/PID/stat (proc_pid_stat(5): 22), counted from the one after the name


class Identity(msgspec.Struct, frozen=True):
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

    @property
    def lives(self) -> bool:
        return Identity.of(self.pid) == self

    def open(self) -> int | None:
        """Return a descriptor of the process (pidfd), for the caller to close; None where it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except (OSError, OverflowError):
            return None
        if self.lives:  # compared after the descriptor holds the process
            return descriptor
        os.close(descriptor)
        return None

    def signal(self, number: int) -> bool:
        """Send a signal to exactly this process; False where it has ended."""
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name in parentheses, the state first; none without it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def strings_of(pid: int, name: str) -> list[str]:
    """Return the strings of /proc/PID/cmdline or environ; none where it has ended, or is another user's."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/{name}").read_bytes()).split("\0")
    except OSError:
        return []


def command_of(pid: int) -> str:
    """Return the command line of a process, in at most 100 characters; empty where it cannot be read."""
    words = strings_of(pid, "cmdline")
    text = " ".join(word for word in words if word).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 100 else f"{text[:99]}…"
