"""The monitor: what a sample has, what it lacks, how it reaches the lead, and what it costs."""

import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mpsrun.config import Config
from mpsrun.errors import UsageError
from mpsrun.monitor import nvml, sampler, trace
from mpsrun.monitor.page import PAGE_BYTES, Reader, Writer
from mpsrun.monitor.sample import Sample, Tenant
from mpsrun.monitor.sampler import sampling
from tests.monitor.fake_pynvml import FakeNvml

DEADLINE_S = 10.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run_dir=tmp_path, trace=tmp_path / "trace.jsonl")


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def next_sample(reader: Reader) -> Sample:
    deadline = time.monotonic() + DEADLINE_S
    while (sample := reader.fresh()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return sample


def test_a_sample_has_everything(fake_nvml: FakeNvml, config: Config, child: "subprocess.Popen[bytes]") -> None:
    fake_nvml.processes = {child.pid: 600, 1: 2000}
    fake_nvml.mps_processes = {child.pid: 700, 2: None}
    fake_nvml.reasons = 0x1 | 0x4 | 0x40
    with sampling(config, has_gpu=True):
        config.watched_gpu.write_text(fake_nvml.uuid)
        reader = Reader(config.sample_page)
        first, second = next_sample(reader), next_sample(reader)
    assert msgspec.structs.replace(second, at_s=0.0, cpu_percent=0.0, host_available_mib=0) == Sample(
        at_s=0.0,
        gpu_percent=87,
        sm_percent=55.0,
        sm_occupancy_percent=30.0,
        tensor_percent=12.5,
        dram_percent=40.0,
        memory_used_mib=4000,
        memory_total_mib=80_000,
        power_w=350.5,
        power_limit_w=700.0,
        sm_clock_mhz=1755,
        sm_clock_max_mhz=1980,
        temperature_c=55,
        slowed_by=("power cap", "heat (hardware)"),
        own_mib=700,
        tenants=(Tenant(1, 2000), Tenant(2, None)),
        cpu_percent=0.0,
        host_available_mib=0,
    )
    assert second.at_s > first.at_s
    assert (second.host_available_mib or 0) > 0
    assert (fake_nvml.open_sessions, fake_nvml.allocated) == (0, 0), "all is given back"
    lines = trace.samples(trace.read(config.trace))  # type: ignore[arg-type]
    assert second in lines


@pytest.mark.parametrize(
    ("changes", "missing", "problem"),
    [
        ({"has_gpm": False}, ["sm_percent", "dram_percent"], "this GPU has no GPM"),
        ({"unsupported": {"nvmlGpmQueryDeviceSupport"}}, ["sm_percent"], "no GPM: Not Supported"),
        ({"denied": {"nvmlGpmMetricsGet"}}, ["sm_percent"], "no GPM: Insufficient Permissions"),
        ({"denied": {"nvmlDeviceGetUtilizationRates"}}, ["gpu_percent"], ""),
        ({"unsupported": {"nvmlDeviceGetPowerUsage"}}, ["power_w"], ""),
        ({"denied": {"nvmlDeviceGetComputeRunningProcesses"}}, ["tenants", "own_mib"], ""),
        ({"unsupported": {"nvmlDeviceGetMPSComputeRunningProcesses"}, "processes": {1: 3}}, [], ""),
        ({"unsupported": {"nvmlDeviceGetCurrentClocksEventReasons"}}, [], ""),
        ({"gpm_stutters": True}, [], ""),
        ({"fails": True}, ["memory_used_mib", "gpu_percent"], "NVML: 9"),
        ({"uuid": "GPU-00000000-0000-0000-0000-000000000000"}, ["memory_used_mib"], "NVML knows no GPU GPU-1"),
    ],
)
def test_what_is_missing_is_left_out_and_told(
    fake_nvml: FakeNvml, config: Config, changes: dict[str, object], missing: list[str], problem: str
) -> None:
    for field, value in changes.items():
        setattr(fake_nvml, field, value)
    with sampling(config, has_gpu=True):
        config.watched_gpu.write_text(FakeNvml().uuid)
        reader = Reader(config.sample_page)
        next_sample(reader)
        sample = next_sample(reader)
    assert [getattr(sample, name) for name in missing] == [None] * len(missing)
    assert problem in sample.problem
    assert bool(sample.problem) == bool(problem)
    assert sample.cpu_percent is not None
    assert sample.slowed_by == () or not sample.has_gpu


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.Unavailable, match="nvidia-ml-py is not installed"), nvml.session():
        pass
    assert (nvml.modes(), nvml.memory_by_pid()) == ([], {})


def test_a_gpu_that_is_lost_in_mid_run(fake_nvml: FakeNvml, config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    with sampling(config, has_gpu=True):
        config.watched_gpu.write_text(fake_nvml.uuid)
        reader = Reader(config.sample_page)
        assert next_sample(reader).has_gpu
        fake_nvml.lost = True
        while (sample := next_sample(reader)).has_gpu:
            pass
        assert sample.problem == "the GPU is lost to NVML: GPU is lost"
        assert not next_sample(reader).has_gpu
    assert capfd.readouterr().err.count("the GPU is lost to NVML") == 1


def test_a_script_that_is_started_again_is_watched_again(fake_nvml: FakeNvml, config: Config) -> None:
    with sampling(config, has_gpu=True):
        for _ in range(2):
            config.watched_gpu.write_text(fake_nvml.uuid)
            assert next_sample(Reader(config.sample_page)).has_gpu
            config.watched_gpu.unlink()  # as the launcher clears up between two starts
            config.sample_page.unlink()
    assert fake_nvml.open_sessions == 0


def test_nobody_asks_and_nothing_is_opened(fake_nvml: FakeNvml, config: Config) -> None:
    with sampling(config, has_gpu=True):
        time.sleep(3 * sampler.WAIT_S)
    assert fake_nvml.calls == []
    assert not config.sample_page.exists()
    with (
        sampling(Config(lanes="serial", run_dir=config.run_dir), has_gpu=True),
        sampling(Config(adapt="off", run_dir=config.run_dir), has_gpu=True),
        sampling(Config(run_dir=config.run_dir), has_gpu=False),
    ):
        assert not any(thread.name == "mpsrun-monitor" for thread in threading.enumerate())


def test_it_samples_less_often_where_the_driver_is_slow(
    fake_nvml: FakeNvml, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps below 1 % of a core by its own CPU time; here every sample seems to cost 4 ms of it."""
    clock = iter(range(10**9))
    times = types.SimpleNamespace(monotonic=time.monotonic, thread_time=lambda: next(clock) * 0.004)
    monkeypatch.setattr(sampler, "time", times)
    waits: list[float] = []
    made = sampler.Sampler(config)
    ending = made._ending
    monkeypatch.setattr(ending, "wait", lambda timeout: waits.append(timeout) or len(waits) > 3)
    config.watched_gpu.write_text("cpu")
    monkeypatch.setattr(ending, "is_set", lambda: len(waits) > 3)
    made._run()
    assert waits[1:4] == pytest.approx([0.5, 0.5, 0.5])
    assert 0.004 / 0.5 < 0.01


def test_a_page_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    """While another thread writes as fast as it can."""
    writer, reader = Writer(tmp_path / "page"), Reader(tmp_path / "page")
    assert reader.fresh() is None
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            writer.write(Sample(float(number), problem=str(number) * 100, memory_used_mib=number))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = 0
        deadline = time.monotonic() + DEADLINE_S
        while seen < 300 and time.monotonic() < deadline:
            if (sample := reader.fresh()) is not None:
                seen += 1
                assert sample.problem == str(sample.memory_used_mib) * 100
                assert sample.at_s == sample.memory_used_mib
    finally:
        done.set()
        thread.join()
    assert seen > 20  # as many as a busy machine reads meanwhile


def test_more_than_a_page_is_cut(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "page")
    tenants = tuple(Tenant(10**6 + index, index) for index in range(5000))
    writer.write(Sample(1.0, problem="x" * PAGE_BYTES, tenants=tenants))
    sample = Reader(tmp_path / "page").fresh()
    assert sample is not None
    assert sample.tenants is not None
    assert {tenant.memory_mib for tenant in sample.tenants} == set(range(4968, 5000))
    assert len(sample.problem) == 200
    (tmp_path / "page").write_bytes(os.urandom(PAGE_BYTES)[:-1])
    assert Reader(tmp_path / "page").fresh() is None
    (tmp_path / "other").write_bytes(b"\2" + bytes(7) + b"\xff\xff\0\0" + b"\xc1" * PAGE_BYTES)
    assert Reader(tmp_path / "other").fresh() is None


def test_traces_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    wanted = [
        trace.Sampled(Sample(1.0, tenants=(Tenant(3, 4),))),
        trace.Stepped(1.5, "training of 5x6", "serial", 1000.0),
        trace.Decided(2.0, "training of 5x6", "serial", "why"),
    ]
    ours, theirs = trace.Trace(path), trace.Trace(path)
    ours.add(wanted[0])
    theirs.add(wanted[1])
    ours.add(wanted[2])
    for one in (ours, theirs):
        one.close()
        one.add(wanted[0])  # after the end nothing is written
    assert list(trace.read(path)) == wanted
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()] == ["sample", "step", "decision"]
    with path.open("a") as file:
        file.write('{"type": "sam')
    assert list(trace.read(path)) == wanted, "the last line may have been cut short"
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"trace.jsonl:4, found"):
        list(trace.read(path))
