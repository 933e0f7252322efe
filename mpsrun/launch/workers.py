"""The worker processes as their parent sees them: started, started again where they end too early, ended."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mpsrun.config import REPORTED, Config
from mpsrun.launch import error_file, leftovers
from mpsrun.launch.ending import Release, end
from mpsrun.launch.failures import Failure, failure, signal_name
from mpsrun.launch.spawn import spawn_worker
from mpsrun.log import last_line, say

BACK_OFF_S = (0.0, 2.0, 8.0)  # before each start after the first; the last one holds for all later ones
_OWN_LOOK_S = 0.2


class Worker:
    """One worker, whatever process it is at the moment.

    tell: what to do with the line that says how a process ended too early. failures: those of all its processes.
    """

    def __init__(self, config: Config, index: int, tell: Callable[[str], None]) -> None:
        self.index = index
        self.role = f"worker {index}"
        self.log = config.worker_log(index)
        self.failures: list[Failure] = []
        self._config = config
        self._tell = tell
        self._generation = 0
        self._due_s: float | None = None  # when to start the next process; None while one runs or none will
        self._ended = False
        self.process = self._spawn()

    def look(self) -> float | None:
        """Start another process where this one ended before its time; returns in how many seconds to look again.

        None where nothing is to be expected but the end of a process. A process that is not there after
        `Config.start_s` is ended, so that another one gets its place.
        """
        if self._due_s is None and not self._ended:
            return self._examine()
        if self._due_s is None or self._config.closing_marker.exists():
            return None
        left_s = self._due_s - time.monotonic()
        return left_s if left_s > 0 else self._start_again()

    def note_end(self) -> None:
        """Note that the process failed, if it did: it ended too early, or has left in its error file why it will."""
        status = self.process.poll()
        errors = self._config.error_file(self.role)
        if self._ended or (status is None and error_file.read(errors) is None):
            return
        self._ended = True
        if status == 0:  # the lead has told it to end
            return
        self.failures.append(
            failure(self.role, self.process.pid, status, time.monotonic(), errors, self._config.kept_log(self.log))
        )
        if status not in (None, REPORTED):  # else the lead has heard why
            self._tell(self._how_it_ended(status))

    def _examine(self) -> float | None:
        if self.process.poll() is not None:
            self.note_end()
            return self._expect_next()
        if self._is_there():
            return None
        left_s = self._since_s + self._config.start_s - time.monotonic()
        if left_s <= 0:
            self.process.kill()
        return max(left_s, 0.1)

    def _expect_next(self) -> float | None:
        """Settle when the next process starts; returns in how many seconds, None where none will."""
        self._due_s = None
        if self._generation >= self._config.worker_restarts:
            return None
        wait_s = BACK_OFF_S[min(self._generation, len(BACK_OFF_S) - 1)]
        self._due_s = time.monotonic() + wait_s
        return wait_s

    def _start_again(self) -> float | None:
        self._generation += 1
        try:
            self.process = self._spawn()
        except OSError as error:  # no memory or no room for a process: as if it had ended at once
            self._tell(f"{self.role} could not be started again: {error.strerror}")
            return self._expect_next()
        self._due_s, self._ended = None, False
        return None

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._since_s = time.monotonic()
        self._was_there = False
        process = spawn_worker(self._config, self.index, os.getpid(), self._generation)
        assert self._config.run_dir is not None
        leftovers.note(self._config.run_dir, process.pid)
        return process

    def _is_there(self) -> bool:
        """Whether it has imported torch and listens on its socket, whatever became of the socket's file since."""
        socket = Path(self._config.worker_socket(self.index, self._generation).removeprefix("ipc://"))
        self._was_there = self._was_there or socket.exists()
        return self._was_there

    def _how_it_ended(self, status: int) -> str:
        how = f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"
        return f"{self.role} (pid {self.process.pid}) {how}; last line of {self.log}: {last_line(self.log)}"


@contextlib.contextmanager
def workers_of(
    config: Config, tell: Callable[[str], None], grace_s: Callable[[], float], release: Release | None = None
) -> Iterator[list[Worker]]:
    """All workers of a run, ended at the end.

    grace_s: how long they may then take by themselves. release: takes those that do not end off the GPU.
    """
    workers: list[Worker] = []
    try:
        for index in range(1, config.worker_count() + 1):
            workers.append(Worker(config, index, tell))  # noqa: PERF401 - those that run end where the next one fails
        yield workers
    finally:
        end([worker.process for worker in workers], grace_s(), release)


def look_at(workers: Sequence[Worker], within_s: float) -> float:
    """Look at each worker; returns in how many seconds to look again, at most `within_s`."""
    return min([within_s, *(left_s for worker in workers if (left_s := worker.look()) is not None)])


class Nursery:
    """Workers of a process that has no launcher: a thread is their parent, since they end with who started them."""

    def __init__(self, config: Config, grace_s: float) -> None:
        self._config = config
        self._grace_s = grace_s
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mpsrun-nursery", daemon=True)

    def start(self) -> None:
        """Start the workers; raises what kept them from being started."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the workers; returns when they are gone."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with workers_of(self._config, say, lambda: self._grace_s) as workers:
                self._started.set()
                while not self._stopping.wait(look_at(workers, _OWN_LOOK_S)):
                    pass
        except Exception as error:  # noqa: BLE001 - raised again where it can be heard
            self._error = error
        finally:
            self._started.set()
