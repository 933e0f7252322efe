"""A fake control program on PATH, and daemons that end with their test."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps.control import CONTROL, PIPE_DIRECTORY, Control
from mpsrun.mps.service import stop_guard, wait_ready


@pytest.fixture
def pipe_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short, empty pipe directory, which this process's environment names."""
    path = tmp_path_factory.mktemp("p")
    monkeypatch.setenv(PIPE_DIRECTORY, str(path))
    return path


@pytest.fixture
def fake_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the scripted control program first on PATH."""
    return put_fake_program(tmp_path, monkeypatch)


def put_fake_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the scripted control program first on PATH, for as long as `monkeypatch` holds."""
    program = tmp_path / "bin" / CONTROL
    program.parent.mkdir()
    source = Path(__file__).with_name("fake_control.py").read_text()
    program.write_text(f"#!{sys.executable} -S\n{source}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(pipe_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Start daemons; nothing of them is left afterwards."""
    guards: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        guards.append(spawn_guard(pipe_dir, tmp_path, os.getpid()))
        return guards[-1]

    yield start
    processes = [child for guard in guards for child in _descendants(guard.pid)]
    for guard in guards:
        stop_guard(guard)
    assert [process for process in processes if process.is_running()] == []


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def control(request: pytest.FixtureRequest, pipe_dir: Path, tmp_path: Path, start: Start) -> Control:
    """A running daemon: the scripted one, and the real one on a machine with a GPU."""
    if request.param == "fake":
        request.getfixturevalue("fake_program")
    elif shutil.which(CONTROL) is None:
        pytest.skip(f"no {CONTROL} on PATH")
    made = Control(pipe_dir)
    wait_ready(start(), made, tmp_path)
    return made
