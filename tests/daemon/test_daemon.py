"""The daemon with a scripted control program: start, faults, stop, and who may use it."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mpsrun.checkout import with_package
from mpsrun.config import Config
from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps.control import PIPE_DIRECTORY, Control, ControlError
from mpsrun.mps.identity import Identity
from mpsrun.mps.lifecycle import cuda_mps
from mpsrun.mps.places import Record
from tests.daemon.conftest import Daemons


def test_start_status_stop(daemons: Daemons, client: "subprocess.Popen[bytes]") -> None:
    assert daemons.command("status").returncode == 3
    record = daemons.start()
    assert record.phase == "ready"
    server = daemons.start_server()
    (daemons.places.pipe_dir / "clients").write_text(str(client.pid))
    daemons.wait(lambda record: len(record.clients) == 1)
    done = daemons.command("status", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert (found["phase"], found["pid"], found["problem"]) == ("ready", record.daemon.pid, "")
    assert found["servers"][0]["pid"] == server
    assert (found["servers"][0]["state"], found["servers"][0]["sm_share"]) == ("ACTIVE", 100.0)
    assert found["servers"][0]["clients"] == [
        {"pid": client.pid, "command": "sleep 60", "sm_share": 100.0, "memory_mib": None}
    ]
    assert (
        f"client        pid {client.pid}, 100 % of the SMs, memory unknown, sleep 60"
        in daemons.command("status").stdout
    )
    refused = daemons.command("stop")
    assert refused.returncode == 1
    assert f"expected no clients of the daemon, found 1: pid {client.pid} (sleep 60); end them" in refused.stderr
    assert daemons.command("stop", "--force").returncode == 0
    assert Identity.of(server) is None
    assert daemons.command("status").stdout == "stopped\n"
    assert list(daemons.places.pipe_dir.iterdir()) == []
    assert daemons.command("stop").stderr == "mpsrun: no daemon runs\n"


def test_one_daemon_only(daemons: Daemons) -> None:
    record = daemons.start()
    assert f"found one in {daemons.places.runtime_dir}" in daemons.command("start").stderr
    done = daemons.command("run")
    assert done.returncode == 2
    assert f"found pid {record.daemon.pid}; see mpsrun daemon status" in done.stderr


def test_settings_reach_the_control_daemon(daemons: Daemons, tmp_path: Path) -> None:
    uuid = "GPU-11111111-2222-3333-4444-555555555555"
    config = tmp_path / "my.toml"
    config.write_text(f'gpus = ["{uuid}"]\nactive_thread_percentage = 40\npinned_memory_limit = {{"{uuid}" = "2G"}}\n')
    daemons.start("--config", str(config), CUDA_VISIBLE_DEVICES="3", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="10")
    assert daemons.control.send("get_default_active_thread_percentage") == "40.0"
    assert daemons.control.send("get_default_device_pinned_mem_limit 0") == "2G"
    assert (daemons.places.pipe_dir / "environment").exists()
    environ = psutil.Process(daemons.wait(lambda r: r.control is not None).control.pid).environ()  # type: ignore[union-attr]
    assert environ["CUDA_VISIBLE_DEVICES"] == uuid
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in environ


@pytest.mark.parametrize("text", ["nonsense = 1", "active_thread_percentage = 0", "active_thread_percentage = 101"])
def test_wrong_settings_start_nothing(daemons: Daemons, tmp_path: Path, text: str) -> None:
    daemons.places.config_file.parent.mkdir(parents=True)
    daemons.places.config_file.write_text(text)
    for command in ("start", "run"):
        done = daemons.command(command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "expected settings of the daemon in" in done.stderr
    assert not daemons.places.is_running()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["restart"], "expected mpsrun daemon run|start|stop|status, found 'restart'"),
        (["stop", "--now"], "expected an option of mpsrun daemon stop (--force, --system), found '--now'"),
        (["start", "--config"], "expected a file after --config, found none"),
    ],
)
def test_wrong_use(daemons: Daemons, words: list[str], found: str) -> None:
    done = daemons.command(*words)
    assert done.returncode == 2
    assert found in done.stderr


# --- faults


def kill_control(record: Record, _server: int) -> None:
    assert record.control is not None
    os.kill(record.control.pid, signal.SIGKILL)


def kill_server(_record: Record, server: int) -> None:
    os.kill(server, signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_control, kill_server])
def test_it_is_ready_again_after_every_kill(daemons: Daemons, kill: Callable[[Record, int], None]) -> None:
    record = daemons.start()
    for count in (1, 2):
        kill(record, daemons.start_server())
        begin = time.monotonic()
        record = daemons.wait(lambda record, count=count: record.phase == "ready" and record.faults == count)  # type: ignore[misc]
        assert daemons.control.is_reachable()
        assert time.monotonic() - begin < 5
    assert daemons.command("status").returncode == 0


def test_clients_of_an_orphaned_server_go_on(daemons: Daemons, client: "subprocess.Popen[bytes]") -> None:
    record = daemons.start()
    server = daemons.start_server()
    (daemons.places.pipe_dir / "clients").write_text(str(client.pid))
    daemons.wait(lambda record: len(record.clients) == 1)
    kill_control(record, server)
    daemons.wait(lambda record: record.phase == "draining")
    assert Identity.of(server) is not None
    assert "draining" in daemons.command("status").stdout
    assert "it cannot be told whether clients run" in daemons.command("stop").stderr
    client.kill()
    client.wait()
    daemons.wait(lambda record: record.phase == "ready")
    assert Identity.of(server) is None


def test_a_killed_daemon_leaves_cuda_mps_to_the_next_one(daemons: Daemons) -> None:
    record = daemons.start()
    server = daemons.start_server()
    os.kill(record.daemon.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while daemons.places.is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert daemons.control.server_list() == [server]
    again = daemons.start()
    assert (again.control, again.servers) == (record.control, daemons.wait(lambda r: bool(r.servers)).servers)
    assert daemons.control.server_list() == [server]
    assert daemons.command("stop").returncode == 0
    assert Identity.of(server) is None


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("fails", "the control daemon ended at its start: Insufficient permissions"),
        pytest.param("forgets", "expected a default share of 40 %", marks=pytest.mark.slow),
    ],
)
def test_a_control_daemon_that_never_gets_ready(
    daemons: Daemons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_MPS_DAEMON", behaviour)
    (tmp_path / "my.toml").write_text("active_thread_percentage = 40")
    with _in_foreground(daemons, "--config", str(tmp_path / "my.toml")) as daemon:
        record = daemons.wait(lambda record: said in record.why)
        assert record.phase != "ready"
        daemon.terminate()
        assert daemon.wait(20) == 0


@pytest.mark.slow
def test_a_control_daemon_that_hangs_is_replaced(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    record = daemons.start()
    assert record.control is not None
    os.kill(record.control.pid, signal.SIGSTOP)
    again = daemons.wait(lambda record: record.phase == "ready" and record.faults == 1)
    assert again.control != record.control
    assert not record.control.lives
    assert "gave no good answer 3 times in a row" in again.why


def test_without_the_binary(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nosuch")
    for command in ("run", "start"):
        done = daemons.command(command)
        assert done.returncode == 1
        assert "no nvidia-cuda-mps-control on PATH; install the NVIDIA driver's compute tools" in done.stderr


def _in_foreground(daemons: Daemons, *words: str, **more: str) -> "subprocess.Popen[bytes]":
    environ = {**with_package(os.environ), **more}
    return subprocess.Popen([sys.executable, "-m", "mpsrun", "daemon", "run", *words], env=environ)


def test_systemd_hears_of_everything(daemons: Daemons, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "n"))
        receiver.settimeout(20)
        with _in_foreground(daemons, NOTIFY_SOCKET=str(tmp_path / "n")) as daemon:
            heard = []
            while "READY=1\nSTATUS=ready" not in heard or heard[-1] != "WATCHDOG=1":
                heard.append(receiver.recv(1000).decode())
            daemon.send_signal(signal.SIGTERM)
            while heard[-1] != "STOPPING=1":
                heard.append(receiver.recv(1000).decode())
            assert daemon.wait(20) == 0


# --- runs


def test_a_run_of_the_same_user_joins_it(daemons: Daemons, tmp_path_factory: pytest.TempPathFactory) -> None:
    daemons.start()
    server = daemons.start_server()
    config = Config(workers=1, run_dir=tmp_path_factory.mktemp("r"), verbose=True)
    with cuda_mps(config, True, "", lambda pipe, log: spawn_guard(pipe, log, os.getpid())):
        assert os.environ[PIPE_DIRECTORY] == str(daemons.places.pipe_dir)
        assert not config.mps_pipe_dir.exists()
    assert PIPE_DIRECTORY not in os.environ
    assert daemons.control.server_list() == [server]


def test_commands_of_several_processes_take_turns(daemons: Daemons) -> None:
    daemons.start()
    lock = os.open(daemons.places.pipe_dir, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    control = Control(daemons.places.pipe_dir, deadline_s=0.3)
    begin = time.monotonic()
    assert control.server_list() == []  # somebody who never gives it back is not waited for
    assert time.monotonic() - begin >= 0.3
    os.close(lock)


def test_only_the_documented_answer_is_success(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    daemons.start()
    daemons.control.set_default_share(30)
    daemons.control.set_default_memory_limit(1, "512M")
    monkeypatch.setenv("FAKE_MPS", "garbage")
    for command in (
        lambda: daemons.control.set_default_share(30),
        lambda: daemons.control.set_default_memory_limit(1, "512M"),
        lambda: daemons.control.share_percent(3),
    ):
        with pytest.raises(ControlError, match="Segmentation fault"):
            command()
    monkeypatch.delenv("FAKE_MPS")
