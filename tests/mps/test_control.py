"""One conformance test for the real control program and the scripted one, and what else may come back."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from mpsrun.mps.control import CONTROL, Control, ControlError
from tests.mps.conftest import Start


def test_conformance(control: Control) -> None:
    assert control.is_reachable()
    assert control.server_list() == []
    control.send(f"start_server -uid {os.getuid()}")
    deadline = time.monotonic() + 10
    while not (servers := control.server_list()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(servers) == 1
    assert Path(f"/proc/{servers[0]}").exists()
    assert control.client_list(servers[0]) == []
    assert control.server_status(servers[0]) in ("INITIALIZING", "ACTIVE")
    assert control.share_percent(servers[0]) == 100.0
    control.set_default_share(40)
    control.set_default_memory_limit(0, "2G")
    with pytest.raises(ControlError):
        control.terminate_client(servers[0], os.getpid())
    control.quit()
    deadline = time.monotonic() + 10
    while control.is_reachable() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not control.is_reachable()


def test_clients_are_listed_and_terminated(fake_program: Path, pipe_dir: Path, start: Start) -> None:
    start()
    control = _reachable(pipe_dir)
    control.send("start_server -uid 0")
    (pipe_dir / "clients").write_text("11 12")
    (server,) = control.server_list()
    assert control.client_list(server) == [11, 12]
    control.terminate_client(server, 12)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("hang", r"expected an answer to 'get_server_list' within 0.5 s, found none"),
        ("garbage", "expected pids in answer to 'get_server_list', found 'Segmentation fault"),
        ("refuse", "found status 1: 'Cannot find MPS control daemon process'"),
        ("wrong-user", "found status 1: 'Insufficient permissions to connect"),
    ],
)
def test_other_answers_are_errors(
    fake_program: Path, pipe_dir: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, text: str
) -> None:
    monkeypatch.setenv("FAKE_MPS", behaviour)
    control = Control(pipe_dir, deadline_s=0.5)
    start = time.monotonic()
    with pytest.raises(ControlError, match=text):
        control.server_list()
    with pytest.raises(ControlError):
        control.quit()
    assert not control.is_reachable()
    assert time.monotonic() - start < 5


def test_a_slow_answer_is_an_answer(
    fake_program: Path, pipe_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    _reachable(pipe_dir)
    monkeypatch.setenv("FAKE_MPS", "slow")
    assert Control(pipe_dir, deadline_s=5.0).server_list() == []


def test_what_was_not_kept_is_no_success(
    fake_program: Path, pipe_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS_DAEMON", "forgets")
    start()
    control = _reachable(pipe_dir)
    with pytest.raises(ControlError, match="expected a default share of 40 % after setting it, found 100 %"):
        control.set_default_share(40)
    with pytest.raises(ControlError, match="expected a memory limit of 2G on device 0, found '0G'"):
        control.set_default_memory_limit(0, "2G")


def test_a_missing_program(pipe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nosuch")
    with pytest.raises(ControlError, match=f"expected {CONTROL} on PATH, found none; install"):
        Control(pipe_dir).server_list()


def test_no_process_of_a_command_is_left(fake_program: Path, pipe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "hang")
    with pytest.raises(ControlError):
        Control(pipe_dir, deadline_s=0.2).server_list()
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", CONTROL], capture_output=True)
    assert found.stdout == b""


def _reachable(pipe_dir: Path) -> Control:
    control = Control(pipe_dir)
    deadline = time.monotonic() + 10
    while not control.is_reachable():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return control
