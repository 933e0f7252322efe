"""The launcher between the user's shell and the lead: which signal goes where.

Terminal keys reach the whole process group, so the lead has them already; a signal that a process sent to the
launcher (`kill`, a batch system) is meant for the script, and handed on.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_UNBLOCKABLE = {signal.SIGKILL, signal.SIGSTOP}
_JOB_CONTROL = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
WATCHED = frozenset(signal.valid_signals()) - _FAULTS - _UNBLOCKABLE
ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


@contextlib.contextmanager
def held() -> Iterator[frozenset[int]]:
    """Block every signal that can be blocked; yields the mask from before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield frozenset(int(number) for number in before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_for_lead(info: signal.struct_siginfo, lead_pid: int) -> bool:
    """Return whether a signal that the launcher took is to be sent to the lead.

    si_code is positive where the kernel made it, for a key or a closed terminal (sigaction(2)). What the
    lead sent itself it sent to its process group, and has received.
    """
    if info.si_signo in (signal.SIGCHLD, signal.SIGCONT):
        return False
    return info.si_code <= 0 and info.si_pid not in (lead_pid, os.getpid())


def stop_with(stop_signal: int) -> None:
    """Stop as the lead has been stopped by a key or by reading from the terminal; returns when continued.

    Other stops (SIGSTOP) are between the lead and who sent it. The kernel ignores these signals where no
    shell could continue the process group.
    """
    if stop_signal in _JOB_CONTROL:
        signal.sigtimedwait({stop_signal}, 0)  # the terminal's own, should it still be pending: one stop is enough
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {stop_signal})
        os.kill(os.getpid(), stop_signal)
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop_signal})


def die_by(number: int) -> None:
    """End this process by a signal, as the lead did, with no second core file; returns if it is ignored."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in _UNBLOCKABLE:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
