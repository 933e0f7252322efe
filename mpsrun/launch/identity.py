"""Ends exactly the processes that are meant, whoever's children they are."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

from mpsrun.mps.identity import Identity


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
