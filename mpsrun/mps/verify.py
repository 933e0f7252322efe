"""Whether processes really are clients of CUDA MPS: without a daemon the driver silently does without it."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mpsrun.mps.control import Control, ControlError, pipe_dir_in_force

Mode = Literal["CUDA MPS", "time-sliced GPU", "CPU"]
_POLL_S = 0.1


@dataclass(frozen=True)
class Attachment:
    """Which mode runs, and why where that is known: which processes are not clients, say."""

    mode: Mode
    reason: str = ""

    def __str__(self) -> str:
        """Return one line for the user."""
        return f"{self.mode} ({self.reason})" if self.reason else self.mode


def verify(pids: Collection[int], uses_cuda: bool = True, deadline_s: float = 5.0) -> Attachment:
    """Return the mode in which the processes `pids` run, all of which have initialised CUDA before.

    Asks again until all are clients or `deadline_s` is over: a client is listed shortly after its context
    is there.
    """
    if not uses_cuda:
        return Attachment("CPU")
    deadline = time.monotonic() + deadline_s
    found: frozenset[int] = frozenset()
    try:
        while True:
            found = attached(pids, deadline_s=max(_POLL_S, deadline - time.monotonic()))
            if found >= set(pids):
                return Attachment("CUDA MPS")
            if time.monotonic() + _POLL_S > deadline:
                break
            time.sleep(_POLL_S)
    except ControlError as error:
        return Attachment("time-sliced GPU", str(error))
    listed = ", ".join(str(pid) for pid in sorted({*pids} - found))
    return Attachment("time-sliced GPU", f"no client of CUDA MPS: pid {listed}")


def attached(pids: Collection[int], deadline_s: float = 5.0) -> frozenset[int]:
    """Return which of `pids` are clients of the CUDA MPS daemon that this process's environment names.

    Raises ControlError where no daemon answers as documented. `deadline_s` is for each question.
    """
    control = Control(pipe_dir_in_force(), deadline_s)
    clients = {client for server in control.server_list() for client in control.client_list(server)}
    return frozenset(pids) & clients
