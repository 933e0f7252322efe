"""Failures of a run as data: which came first, and the report of them in the form of torch.distributed.elastic."""

import datetime as dt
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpsrun.launch import error_file
from mpsrun.mps import faults

Role = str  # "lead", "worker 1", "CUDA MPS server", "CUDA MPS daemon", "mpsrun"
_WIDTH = 60
# A GPU's fault reaches one process after the other, and their ends may be noticed all at once: what cannot be the
# consequence of another process's end comes first.
_BEFORE = ("CUDA MPS daemon", "CUDA MPS server", "worker", "lead")
_AT_ONCE_S = 0.5
_SUSPECT_S = 60.0  # a failure so long before the lead's may have caused it
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGKILL}


@dataclass(frozen=True)
class Failure:
    """One process that failed.

    returncode: its exit status, minus the signal that ended it, or None where it was not waited for. at_s: on the
    monotonic clock. traceback: what it said itself, where it could.
    """

    role: Role
    pid: int
    returncode: int | None
    at_s: float
    when: dt.datetime
    log: Path | None = None
    message: str = ""
    traceback: str = ""

    @property
    def fault(self) -> faults.Fault | None:
        """The CUDA error behind it, if it was one that ends a context."""
        return faults.find(self.message) or faults.find(self.traceback[-2000:])

    @property
    def crashed(self) -> bool:
        """Whether it ended by a signal that no user sends to stop a script."""
        return self.returncode is not None and -self.returncode in _CRASHES

    def how(self) -> str:
        """Say how it ended, in words."""
        if self.message and (self.returncode is None or self.returncode > 0):
            return self.message.splitlines()[0]
        if self.returncode is None:
            return "ended"
        if self.returncode < 0:
            return f"Signal {-self.returncode} ({signal_name(-self.returncode)}) received by PID {self.pid}"
        return f"ended with exit status {self.returncode}"


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9; a number without a name (real-time signals) as `signal 40`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failure(
    role: Role, pid: int, returncode: int | None, at_s: float, errors: Path, log: Path | None = None
) -> Failure:
    """Make a failure of what was seen at `at_s`, and of what the process has left in the file `errors`.

    The file is removed: the next process in this role has its own.
    """
    now = dt.datetime.now().astimezone()
    left = error_file.read(errors)
    errors.unlink(missing_ok=True)
    if left is None:
        return Failure(role, pid, returncode, at_s, now, log)
    said_s = left.extraInfo.monotonic_s
    at_s = min(at_s, said_s) if said_s is not None and said_s > 0 else at_s
    return Failure(role, pid, returncode, at_s, now, log, left.message, left.extraInfo.py_callstack)


def in_order(failures: Sequence[Failure]) -> list[Failure]:
    """Return the failures with the root cause first.

    It is the first in time that can have to do with the lead's: an exception of the script alone has no other cause,
    and a worker that was lost a minute before was lived without. Of failures at once the deeper one comes first.
    """
    ordered = _by_time(failures)
    lead = next((failed for failed in ordered if failed.role == "lead"), None)
    if lead is None:
        return ordered
    suspects = [failed for failed in ordered if failed is not lead and _may_have_caused(failed, lead)]
    root = suspects[0] if suspects else lead
    return [root, *(failed for failed in ordered if failed is not root)]


def poisoned(failures: Sequence[Failure]) -> bool:
    """Return whether the CUDA MPS server may be of no use: a context was lost, or a process that had one crashed."""
    return any(failed.fault is not None or failed.crashed or _depth(failed) < 2 for failed in failures)


def report(name: str, failures: Sequence[Failure]) -> str:
    """Return the report of a failed run, the root cause first."""
    first, *others = in_order(failures)
    lines = ["=" * _WIDTH, f"{name} FAILED", "-" * _WIDTH, "Root Cause (first observed failure):", *_lines(0, first)]
    lines += ["-" * _WIDTH, "Other Failures:"]
    lines += [line for index, failed in enumerate(others, 1) for line in _lines(index, failed)]
    return "\n".join([*lines, *([] if others else ["  <NO_OTHER_FAILURES>"]), "=" * _WIDTH])


def _by_time(failures: Sequence[Failure]) -> list[Failure]:
    """Return the failures in their order; what came at once, the deepest first."""
    ordered: list[Failure] = []
    rest = sorted(failures, key=lambda failed: failed.at_s)
    while rest:
        at_once = [failed for failed in rest if failed.at_s - rest[0].at_s <= _AT_ONCE_S]
        ordered += sorted(at_once, key=_depth)
        rest = rest[len(at_once) :]
    return ordered


def _depth(failed: Failure) -> int:
    return next((depth for depth, role in enumerate(_BEFORE) if failed.role.startswith(role)), 0)


def _may_have_caused(failed: Failure, lead: Failure) -> bool:
    if not lead.at_s - _SUSPECT_S <= failed.at_s <= lead.at_s + _AT_ONCE_S:
        return False
    return lead.fault is not None or lead.crashed or "WorkerError" in lead.message or _depth(failed) < 2


def _lines(index: int, failed: Failure) -> list[str]:
    said = failed.traceback.rstrip().replace("\n", "\n    ") or failed.how()
    name = f" ({signal_name(-failed.returncode)})" if failed.returncode is not None and failed.returncode < 0 else ""
    code = "<N/A>" if failed.returncode is None else failed.returncode
    lines = [
        f"[{index}]:",
        f"  time      : {failed.when:%Y-%m-%d_%H:%M:%S}",
        f"  host      : {socket.gethostname()}",
        f"  role      : {failed.role}",
        f"  exitcode  : {code}{name} (pid: {failed.pid})",
        f"  log_file  : {failed.log or ('<N/A>' if failed.role == 'lead' else '<not kept; --log-dir DIR keeps it>')}",
        f"  traceback : {said}",
    ]
    return [*lines, f"  meaning   : {failed.fault}"] if failed.fault else lines
