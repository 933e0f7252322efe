"""How a child is tied to the launcher: it dies with it, and starts with the signals the user's shell gave.

The launcher blocks signals before it starts children. They inherit the mask and lift it once they are ready
for a signal, so that a Ctrl-C in their first milliseconds is neither lost nor answered with a traceback of
mpsrun.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Collection, MutableMapping

ENV_PARENT = "MPSRUN_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parent_env(parent_pid: int, mask: Collection[int] = ()) -> dict[str, str]:
    """Return the variable that tells a child its parent and the signals to leave blocked."""
    return {ENV_PARENT: " ".join(str(int(number)) for number in (parent_pid, *sorted(mask)))}


def is_child(environ: MutableMapping[str, str]) -> bool:
    """Return whether this process was started by a launcher."""
    return ENV_PARENT in environ


def tie_to_parent(death_signal: int = signal.SIGKILL) -> frozenset[int]:
    """Die with the parent from now on; return the signal mask to set once signals are welcome.

    The variable is taken out of the environment: it is true of this process only. The kernel sends
    `death_signal` when the *thread* that started this process ends, so children are started from the
    launcher's main thread.
    """
    parent_pid, *mask = (int(word) for word in os.environ.pop(ENV_PARENT).split())
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it ended before the call above
        raise SystemExit(1)
    return frozenset(mask)


def welcome_signals(mask: Collection[int]) -> None:
    """Lift the mask inherited from the launcher."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
