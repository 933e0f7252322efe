"""Running a script plainly and under the launcher, in a directory of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SERIAL_LINE = b"mpsrun: serial lanes: plain run, no worker processes\n"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """Children inherit what is ignored, as under nohup or behind `&`; a test of signals wants them as they come."""
    ignored = [n for n in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Runner:
    """Starts `python` and `mpsrun` in `cwd`, with runtime directories of the test's own."""

    cwd: Path
    runtime: Path
    env: dict[str, str] = field(default_factory=dict)

    def environ(self, **more: str) -> dict[str, str]:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": paths, "XDG_RUNTIME_DIR": str(self.runtime), **self.env, **more}

    def python(
        self, *args: str, flags: tuple[str, ...] = (), **options: object
    ) -> "subprocess.CompletedProcess[bytes]":
        return self._run([sys.executable, *flags, *args], **options)

    def mpsrun(
        self, *args: str, flags: tuple[str, ...] = (), **options: object
    ) -> "subprocess.CompletedProcess[bytes]":
        return self._run([sys.executable, *flags, "-m", "mpsrun", *args], **options)

    def serial(self, *args: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
        """Run without workers; takes the line that says so off stderr."""
        done = self.mpsrun("--lanes", "serial", *args, **options)  # type: ignore[arg-type]
        assert done.stderr.startswith(SERIAL_LINE), done.stderr
        done.stderr = done.stderr.removeprefix(SERIAL_LINE)
        return done

    def start(self, *args: str, **options: object) -> "subprocess.Popen[bytes]":
        """Start `mpsrun args` with pipes."""
        settings: dict[str, object] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        settings.update(options)
        command = [sys.executable, "-m", "mpsrun", *args]
        return subprocess.Popen(command, cwd=self.cwd, env=self.environ(), **settings)  # type: ignore[call-overload]

    def script(self, text: str, name: str = "train.py") -> str:
        path = self.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    def run_dirs(self) -> list[Path]:
        base = self.runtime / "mpsrun"
        return [entry for entry in base.iterdir() if entry.is_dir()] if base.exists() else []

    def _run(self, command: list[str], **options: object) -> "subprocess.CompletedProcess[bytes]":
        options.setdefault("stdin", subprocess.DEVNULL) if "input" not in options else None
        return subprocess.run(
            command, cwd=self.cwd, env=self.environ(), capture_output=True, timeout=60, check=False, **options
        )  # type: ignore[call-overload]


@pytest.fixture
def runner(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner that leaves neither a process nor a run directory behind."""
    runtime = tmp_path_factory.mktemp("r")
    made = Runner(tmp_path, runtime)
    before = set(children(os.getpid()))  # workers that other tests share
    yield made
    deadline = time.monotonic() + 5  # nothing may outlive its run by more
    while (left := [*made.run_dirs(), *(set(children(os.getpid())) - before)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def children(pid: int) -> list[psutil.Process]:
    """The living descendants of a process."""
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def same(runner: Runner) -> Callable[..., "subprocess.CompletedProcess[bytes]"]:
    """Assert that a command line gives the same output and exit status under `python` and `mpsrun`."""

    def check(*args: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
        plain = runner.python(*args, **options)  # type: ignore[arg-type]
        ours = runner.serial(*args, **options)
        assert ours.stdout == plain.stdout
        assert ours.stderr == plain.stderr
        assert ours.returncode == plain.returncode
        return plain

    return check
