"""Which processes are clients, and the mode that is said."""

import os
import threading
import time
from pathlib import Path

import pytest

from mpsrun.mps.control import Control, ControlError
from mpsrun.mps.service import wait_ready
from mpsrun.mps.verify import Attachment, attached, verify
from tests.mps.conftest import Start


@pytest.fixture
def server(fake_program: Path, pipe_dir: Path, start: Start, tmp_path: Path) -> Control:
    control = Control(pipe_dir)
    wait_ready(start(), control, tmp_path)
    control.send("start_server -uid 0")
    return control


def test_all_are_clients(server: Control, pipe_dir: Path) -> None:
    (pipe_dir / "clients").write_text("11 12 13")
    assert verify([11, 12]) == Attachment("CUDA MPS")
    assert attached([11, 14]) == {11}


def test_a_client_may_come_late(server: Control, pipe_dir: Path) -> None:
    (pipe_dir / "clients").write_text("11")
    threading.Timer(0.4, lambda: (pipe_dir / "clients").write_text("11 12")).start()
    assert verify([11, 12]) == Attachment("CUDA MPS")


def test_one_is_missing(server: Control, pipe_dir: Path) -> None:
    (pipe_dir / "clients").write_text("11")
    assert str(verify([11, 12], deadline_s=0.3)) == "time-sliced GPU (no client of CUDA MPS: pid 12)"


def test_no_daemon(fake_program: Path, pipe_dir: Path) -> None:
    with pytest.raises(ControlError):
        attached([1])
    found = verify([os.getpid()])
    assert found.mode == "time-sliced GPU"
    assert "Cannot find MPS control daemon" in found.reason


def test_a_daemon_that_hangs(fake_program: Path, pipe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "hang")
    start = time.monotonic()
    assert verify([1], deadline_s=0.5).mode == "time-sliced GPU"
    assert time.monotonic() - start < 3


def test_cpu() -> None:
    assert str(verify([1], uses_cuda=False)) == "CPU"


@pytest.mark.gpu
def test_a_real_client_is_listed(start: Start, pipe_dir: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    wait_ready(start(), Control(pipe_dir), tmp_path)
    program = "import torch; torch.zeros(1, device='cuda'); print('up', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        assert verify([client.pid]) == Attachment("CUDA MPS")
        assert verify([client.pid, os.getpid()], deadline_s=0.5).reason.endswith(f"pid {os.getpid()}")
        client.communicate(b"\n", timeout=20)
