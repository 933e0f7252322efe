"""A private daemon starts, answers, and ends with the run in whatever way that ends; a foreign one stays."""

import functools
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from mpsrun.config import Config
from mpsrun.errors import MpsrunError, UsageError
from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps.control import PIPE_DIRECTORY, Control
from mpsrun.mps.lifecycle import cuda_mps
from mpsrun.mps.service import wait_ready
from tests.mps.conftest import Start


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(workers=1, run_dir=tmp_path_factory.mktemp("r"))


def use(config: Config, has_gpu: bool = True) -> AbstractContextManager[None]:
    start_guard = functools.partial(spawn_guard, parent_pid=os.getpid())
    return cuda_mps(config, has_gpu, "" if has_gpu else "no NVIDIA driver is loaded", start_guard)


def test_a_private_daemon(fake_program: Path, pipe_dir: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("FAKE_MPS_DAEMON", "slow")
    with use(config):
        assert os.environ[PIPE_DIRECTORY] == str(config.mps_pipe_dir)
        control = Control(config.mps_pipe_dir)
        control.send("start_server -uid 0")
        (server,) = control.server_list()
        assert "CUDA_VISIBLE_DEVICES" not in (config.mps_pipe_dir / "environment").read_text()
        assert "CUDA_MPS_LOG_DIRECTORY" in (config.mps_pipe_dir / "environment").read_text()
    assert os.environ[PIPE_DIRECTORY] == str(pipe_dir)
    assert not control.is_reachable()
    assert not psutil.pid_exists(server)


def test_a_foreign_daemon_is_joined_and_left(
    fake_program: Path, pipe_dir: Path, config: Config, start: Start, tmp_path: Path
) -> None:
    foreign = Control(pipe_dir)
    wait_ready(start(), foreign, tmp_path)
    foreign.send("start_server -uid 0")
    before = foreign.server_list()
    with use(config):
        assert os.environ[PIPE_DIRECTORY] == str(pipe_dir)
        assert not config.mps_pipe_dir.exists()
    assert foreign.server_list() == before


@pytest.mark.parametrize("behaviour", ["stubborn", "leaves-server"])
def test_what_does_not_end_is_killed(
    fake_program: Path, pipe_dir: Path, config: Config, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setenv("FAKE_MPS_DAEMON", behaviour)
    with use(config):
        control = Control(config.mps_pipe_dir)
        control.send("start_server -uid 0")
        (server,) = control.server_list()
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(server) or psutil.Process(server).status() == psutil.STATUS_ZOMBIE
    assert not control.is_reachable()


def test_a_daemon_that_cannot_start(
    fake_program: Path,
    pipe_dir: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_MPS_DAEMON", "fails")
    with use(config):
        assert os.environ[PIPE_DIRECTORY] == str(pipe_dir)
    assert "no CUDA MPS (the CUDA MPS daemon ended at its start: Insufficient permissions)" in capfd.readouterr().err


def test_a_daemon_that_never_answers(
    fake_program: Path, pipe_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_MPS_DAEMON", "mute")
    monkeypatch.setattr("mpsrun.mps.service.START_S", 0.5)
    with pytest.raises(MpsrunError, match=r"did not answer within 0\.5 s"):
        wait_ready(start(), Control(pipe_dir, deadline_s=0.3), tmp_path)


def test_on_without_a_gpu_or_a_program(
    pipe_dir: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    insist = Config(workers=1, run_dir=config.run_dir, mps="on")
    with pytest.raises(UsageError, match="found no NVIDIA driver is loaded; "), use(insist, has_gpu=False):
        pass
    with pytest.raises(UsageError, match="serial lanes"), use(Config(mps="on", lanes="serial")):
        pass
    monkeypatch.setenv("PATH", "/nosuch")
    with pytest.raises(UsageError, match="found no nvidia-cuda-mps-control on PATH"), use(insist):
        pass
    with use(config):
        pass
    assert capfd.readouterr().err.count("no CUDA MPS (no nvidia-cuda-mps-control on PATH)") == 1


def test_off_keeps_clear_of_a_daemon_in_the_default_place(fake_program: Path, pipe_dir: Path, config: Config) -> None:
    with use(Config(workers=1, run_dir=config.run_dir, mps="off")):
        assert not Path(os.environ[PIPE_DIRECTORY]).exists()


def test_a_killed_launcher_takes_the_daemon_along(fake_program: Path, pipe_dir: Path, config: Config) -> None:
    program = (
        "import functools, os, sys, time\nfrom pathlib import Path\n"
        "from mpsrun.config import Config\nfrom mpsrun.launch.spawn import spawn_guard\n"
        "from mpsrun.mps.lifecycle import cuda_mps\nfrom mpsrun.mps.control import Control\n"
        "config = Config(workers=1, run_dir=Path(sys.argv[1]))\n"
        "with cuda_mps(config, True, '', functools.partial(spawn_guard, parent_pid=os.getpid())):\n"
        "    Control(config.mps_pipe_dir).send('start_server -uid 0')\n"
        "    print('up', flush=True)\n    time.sleep(30)\n"
    )
    command = [sys.executable, "-c", program, str(config.run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"up\n"
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert len(family) == 3  # guard, daemon, server
        launcher.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=5)
    assert left == []
