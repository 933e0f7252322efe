"""The daemon and the monitor on a real GPU: kills, one conformance with the script, what NVML really tells."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpsrun.checkout import with_package
from mpsrun.config import Config
from mpsrun.monitor import nvml
from mpsrun.monitor.page import Reader
from mpsrun.monitor.sample import Sample
from mpsrun.monitor.sampler import sampling
from mpsrun.mps.places import Places, Record

pytestmark = pytest.mark.gpu
KILLS = 20
CLIENT = "import torch; torch.zeros(1, device='cuda'); print('up', flush=True); input()"


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    environ = with_package(os.environ)
    program = [sys.executable, "-m", "mpsrun", "daemon", *words]
    return subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60)


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("d")))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    yield Places.user()
    command("stop", "--force")


def wait_ready(places: Places, faults: int) -> Record:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        record = places.record()
        if record is not None and record.phase == "ready" and record.faults >= faults:
            return record
        time.sleep(0.01)
    raise AssertionError(f"not ready again: {places.record()}")


def start_client(places: Places) -> "subprocess.Popen[bytes]":
    environ = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(places.pipe_dir)}
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    return client


@pytest.mark.parametrize("victim", ["server", "control"])
def test_twenty_kills(places: Places, victim: str) -> None:
    """Ready again within five seconds each time, and then a client really works."""
    assert command("start").returncode == 0
    for count in range(1, KILLS + 1):
        if victim == "server":
            client = start_client(places)
            deadline = time.monotonic() + 10
            while not (servers := wait_ready(places, count - 1).servers):
                assert time.monotonic() < deadline
            client.communicate(b"\n", timeout=20)
            os.kill(servers[0].pid, signal.SIGKILL)
        else:
            record = wait_ready(places, count - 1)
            assert record.control is not None
            os.kill(record.control.pid, signal.SIGKILL)
        begin = time.monotonic()
        wait_ready(places, count)
        assert time.monotonic() - begin < 5
    start_client(places).communicate(b"\n", timeout=20)
    assert command("stop").returncode == 0


def test_settings_and_clients_of_the_real_program(places: Places, tmp_path: Path) -> None:
    uuid = nvml.modes()[0].uuid
    (tmp_path / "d.toml").write_text(
        f'gpus = ["{uuid}"]\nactive_thread_percentage = 40\npinned_memory_limit = {{"{uuid}" = "8G"}}\n'
    )
    done = command("start", "--config", str(tmp_path / "d.toml"))
    assert done.returncode == 0, done.stderr
    client = start_client(places)
    told = command("status").stdout
    assert f"pid {client.pid}, 40 % of the SMs" in told
    assert "ACTIVE" in told
    assert command("stop").returncode == 1
    client.communicate(b"\n", timeout=20)
    assert command("stop").returncode == 0


def test_the_monitor_sees_the_gpu_and_costs_little(tmp_path: Path) -> None:
    import torch

    busy = torch.randn(4096, 4096, device="cuda")
    config = Config(run_dir=tmp_path)
    seen: list[Sample] = []
    with sampling(config, has_gpu=True):
        config.watched_gpu.write_text(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        reader = Reader(config.sample_page)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for _ in range(10):
                busy = torch.tanh(busy @ busy)
            torch.cuda.synchronize()
            if (sample := reader.fresh()) is not None:
                seen.append(sample)
    assert len(seen) > 10
    last = seen[-1]
    assert (last.memory_used_mib or 0) > 0
    assert (last.power_w or 0) > 50
    assert last.slowed_by is not None
    if not last.problem:
        assert (last.sm_percent or 0) > 50
