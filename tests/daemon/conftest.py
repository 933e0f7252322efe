"""Daemons with a scripted control program, in directories of the test's own; none outlives its test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpsrun.checkout import with_package
from mpsrun.mps.control import Control
from mpsrun.mps.places import Places, Record
from tests.mps.conftest import put_fake_program

DEADLINE_S = 20.0


@dataclass
class Daemons:
    """Runs `mpsrun daemon WORDS` for the places of one test."""

    places: Places

    def command(self, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mpsrun", "daemon", *words]
        environ = {**with_package(os.environ), **more}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    def start(self, *words: str, **more: str) -> Record:
        done = self.command("start", *words, **more)
        assert done.returncode == 0, done.stderr
        record = self.places.record()
        assert record is not None
        return record

    @property
    def control(self) -> Control:
        return Control(self.places.pipe_dir)

    def start_server(self) -> int:
        self.control.send(f"start_server -uid {os.getuid()}")
        return self.wait(lambda record: bool(record.servers)).servers[0].pid

    def wait(self, wanted: Callable[[Record], bool]) -> Record:
        """The daemon's record, once it is as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            record = self.places.record()
            if record is not None and wanted(record):
                return record
            time.sleep(0.02)
        raise AssertionError(f"the daemon never got there; now it is {self.places.record()}")


@pytest.fixture
def daemons(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Daemons]:
    put_fake_program(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("d")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    made = Daemons(Places.user())
    yield made
    record = made.places.record()
    made.command("stop", "--force")
    assert not made.places.is_running()
    if record is not None:
        left = [record.control, *record.servers]
        assert not any(process.lives for process in left if process is not None)


@pytest.fixture
def client() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is told as a client."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.send_signal(signal.SIGKILL)
