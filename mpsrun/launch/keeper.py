"""The keeper: clears up after a launcher that died without doing so.

`python -m mpsrun keeper RUN_DIR`: reads lines from the launcher, of which it alone has the other end. It has a process
group of its own, which no key reaches, and all signals blocked. When the pipe closes, the launcher is dead, and
whatever the run has started ends with it. That needs nobody's interpreter to be free, and holds where the parent-death
signal is lost, as in a script that changes its user. The lines name the lead: should it end, and a stopped launcher do
nothing about it, the workers end, too.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from mpsrun.launch.leftovers import clear, end_processes, note
from mpsrun.mps.identity import Identity

AGAIN_S = 10.0  # between two starts of another keeper
LEAD_S = 2.0  # what the launcher has to say that it ends the others, once the lead has ended
MPS_S = 3.0  # what the guard of a private CUDA MPS has to end it in good order
_DONE = b"done\n"
_NO_LEAD = b"none\n"


class Keeper:
    """The launcher's end of the pipe. `start` starts a keeper: the first one, and another where one was killed."""

    def __init__(self, run_dir: Path, start: "Callable[[], subprocess.Popen[bytes]]") -> None:
        self._run_dir = run_dir
        self._start = start
        self._process = start()
        self._last = _NO_LEAD
        self._next_s = 0.0

    def look(self) -> None:
        """Start another keeper where this one has ended, as far as that can be done: there are other ties than this."""
        if self._process.poll() is None or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + AGAIN_S
        with contextlib.suppress(OSError):
            process = self._start()
            self._pipe.close()
            self._process = process
            self._tell(self._last)

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None, "it is started with a pipe"
        return self._process.stdin

    def lead(self, pid: int) -> None:
        """Have the others end with this process, which is noted, too."""
        note(self._run_dir, pid)
        if (identity := Identity.of(pid)) is not None:
            self._last = f"{identity}\n".encode()
            self._tell(self._last)

    def no_lead(self) -> None:
        """The launcher knows that the lead has ended, and ends the others itself."""
        self._last = _NO_LEAD
        self._tell(self._last)

    def dismiss(self) -> None:
        """The run is over and nothing is left to clear."""
        self._tell(_DONE)
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _tell(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it; the next look starts another
            self._pipe.write(line)


@contextlib.contextmanager
def keeping(run_dir: Path, start: "Callable[[], subprocess.Popen[bytes]]") -> Iterator[Keeper]:
    """Yield the keeper's other end; it is dismissed at the end."""
    keeper = Keeper(run_dir, start)
    try:
        yield keeper
    finally:
        keeper.dismiss()


def main(args: Sequence[str]) -> int:
    """Keep the run in the directory `args[0]` until the launcher dismisses this process or dies; returns 0."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    run_dir = Path(args[0])
    if not _is_dismissed(run_dir):
        clear(run_dir, MPS_S)
    return 0


def _is_dismissed(run_dir: Path) -> bool:
    """Wait for the launcher's last word: False where it died instead."""
    lead: Identity | None = None
    while True:
        if lead is not None and not _speaks_before_end_of(lead):
            lead = None
            if not _speaks_within(LEAD_S):
                end_processes(run_dir)
        line = _read_line()
        if line in (b"", _DONE):
            return line == _DONE
        lead = None if line == _NO_LEAD else Identity.parse(line.decode())


def _speaks_before_end_of(process: Identity) -> bool:
    """Wait for a line, or for the end of a process, which may have ended already; return whether there is a line."""
    descriptor = process.open()
    if descriptor is None:
        return False
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(descriptor, select.POLLIN)
    ready = dict(poller.poll())
    os.close(descriptor)
    return 0 in ready


def _speaks_within(timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(0, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line
