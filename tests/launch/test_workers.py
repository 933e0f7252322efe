"""When a worker process is started again, and when not: with processes that end as a test says."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpsrun import config as configs
from mpsrun.config import REPORTED, Config
from mpsrun.launch import workers
from mpsrun.launch.ending import end
from mpsrun.launch.error_file import leave_error
from mpsrun.launch.leftovers import noted
from mpsrun.launch.workers import Nursery, Worker, look_at


class Launched:
    """Workers whose processes run these programs, one after the other, the last one again and again."""

    def __init__(self, patch: pytest.MonkeyPatch, *programs: str) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: list[str] = []
        self._programs = list(programs)
        patch.setattr(workers, "spawn_worker", self._spawn)
        patch.setattr(workers, "BACK_OFF_S", (0.0, 0.1))

    def _spawn(self, config: Config, index: int, parent_pid: int, generation: int) -> subprocess.Popen[bytes]:
        assert generation == len(self.processes)
        program = self._programs[min(generation, len(self._programs) - 1)]
        self.processes.append(subprocess.Popen([sys.executable, "-S", "-c", program]))
        return self.processes[-1]

    def run(self, worker: Worker, until: Callable[[], bool], deadline_s: float = 10.0) -> None:
        deadline = time.monotonic() + deadline_s
        while not until():
            assert time.monotonic() < deadline
            time.sleep(min(0.02, look_at([worker], 0.02)))


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return Config(run_dir=tmp_path, workers=1)


def test_back_off_and_bound(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    launched = Launched(monkeypatch, "raise SystemExit(3)")
    worker = Worker(settings, 1, launched.told.append)
    start = time.monotonic()
    launched.run(worker, lambda: len(launched.told) == 1 + settings.worker_restarts)
    assert time.monotonic() - start > 2 * 0.1, "the second and the third time it has to wait"
    for _ in range(10):
        assert worker.look() is None
    assert len(launched.processes) == 1 + settings.worker_restarts
    assert all("worker 1 (pid " in line and "ended with status 3" in line for line in launched.told)


def test_what_a_worker_has_told_the_lead_is_not_told_again(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    launched = Launched(monkeypatch, f"raise SystemExit({REPORTED})", "input()")
    worker = Worker(settings, 1, launched.told.append)
    launched.run(worker, lambda: len(launched.processes) == 2)
    assert launched.told == []
    end(launched.processes)


def test_each_process_that_fails_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    """One that raised, one that crashed, and one that has said why it ends but is still there; each is noted once."""
    launched = Launched(
        monkeypatch, f"raise SystemExit({REPORTED})", "import os; os.abort()", "import time; time.sleep(60)"
    )
    leave_error(settings.error_file("worker 1"), ValueError("of the first"))
    worker = Worker(settings, 1, launched.told.append)
    launched.run(worker, lambda: len(launched.processes) == 3)
    leave_error(settings.error_file("worker 1"), ValueError("of the third"))
    for _ in range(3):
        worker.note_end()
    found = [(failed.role, failed.pid, failed.returncode, failed.message) for failed in worker.failures]
    first, second, third = (process.pid for process in launched.processes)
    assert found == [
        ("worker 1", first, REPORTED, "ValueError: of the first"),
        ("worker 1", second, -signal.SIGABRT, ""),
        ("worker 1", third, None, "ValueError: of the third"),
    ]
    end(launched.processes)


def test_one_that_was_told_to_end_has_not_failed(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    launched = Launched(monkeypatch, "")
    worker = Worker(settings, 1, launched.told.append)
    launched.processes[0].wait()
    worker.note_end()
    assert (worker.failures, launched.told) == ([], [])


def test_the_keeper_knows_each_process(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    """Also those that take the place of others: they end with a run whose launcher died."""
    launched = Launched(monkeypatch, "import time; time.sleep(60)")
    worker = Worker(settings, 1, launched.told.append)
    launched.processes[0].kill()
    launched.run(worker, lambda: len(launched.processes) == 2)
    assert settings.run_dir is not None
    assert [found.pid for found in noted(settings.run_dir)] == [process.pid for process in launched.processes]
    end(launched.processes)


def test_not_while_the_run_ends(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    launched = Launched(monkeypatch, "")
    worker = Worker(settings, 1, launched.told.append)
    launched.processes[0].wait()
    settings.closing_marker.touch()
    for _ in range(10):
        worker.look()
    assert len(launched.processes) == 1


def test_one_that_is_never_there_is_ended(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    monkeypatch.setattr(configs, "START_S", 0.2)
    launched = Launched(monkeypatch, "import time; time.sleep(60)")
    worker = Worker(dataclasses.replace(settings, timeout_s=0.1), 1, launched.told.append)
    launched.run(worker, lambda: len(launched.processes) == 2)
    assert "was killed by SIGKILL" in launched.told[0]
    socket = settings.run_dir / "worker-1.1"  # type: ignore[operator]
    socket.touch()  # the next one is there
    worker.look()
    socket.unlink()  # somebody clears the directory; what is connected stays so
    time.sleep(0.4)
    worker.look()
    assert launched.processes[1].poll() is None
    end(launched.processes)


def test_no_room_for_another_process(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    launched = Launched(monkeypatch, "")
    worker = Worker(settings, 1, launched.told.append)
    launched.processes[0].wait()

    def refuse(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers, "spawn_worker", refuse)
    launched.run(worker, lambda: len(launched.told) == settings.worker_restarts)
    for _ in range(10):
        assert worker.look() is None
    assert "could not be started again: Resource temporarily unavailable" in launched.told[0]


def test_a_nursery_says_why_there_is_no_worker(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    monkeypatch.setattr(workers, "spawn_worker", lambda *_: Path("/nowhere").read_bytes())
    with pytest.raises(FileNotFoundError):
        Nursery(settings, 0.0).start()
