"""Plans that follow the load in real training steps on CPU workers, with samples and step times of the test's own."""

import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pool
import pytest
import torch
import torch._dynamo
from networks import Three
from test_choosing import Timed, both, train, tuned, until_decided  # noqa: F401 - `tuned` is a fixture
from transparency import Trained, trained

from mpsrun import config, log
from mpsrun.checkout import with_package
from mpsrun.monitor import trace
from mpsrun.monitor.page import Writer
from mpsrun.monitor.sample import Sample, Tenant
from mpsrun.plan import adapt
from mpsrun.run import backend, in_place, plans, report
from mpsrun.run import eyes as eyes_module
from mpsrun.run import tuning as tuning_module
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.tuning import Tuning
from mpsrun.run.variant import Variant
from tests.plan.made import contenders

MOST_STEPS = 400
QUIET = Sample(0.0, memory_used_mib=4000, memory_total_mib=80_000, tenants=(), slowed_by=(), sm_percent=50.0)


class Load:
    """A stand-in for the monitor: it writes the page, and its clock runs 0.1 s a step."""

    def __init__(self, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sample = QUIET
        self.now_s = 1000.0
        self._writer = Writer(page)
        monkeypatch.setattr(eyes_module, "time", types.SimpleNamespace(monotonic=self._tick))

    def _tick(self) -> float:
        self.now_s += 0.1
        self._writer.write(with_(self.sample, at_s=self.now_s))
        return self.now_s

    def close(self) -> None:
        self._writer.close()


def with_(sample: Sample, **changes: object) -> Sample:
    return msgspec.structs.replace(sample, **changes)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "say", lines.append)
    return lines


@pytest.fixture
def load(
    tuned: Coordinator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Load]:
    settings = dataclasses.replace(config.current(), adapt="on", run_dir=tmp_path, trace=tmp_path / "trace.jsonl")
    monkeypatch.setattr(config, "current", lambda: settings)
    eyes_module.eyes.cache_clear()
    made = Load(settings.sample_page, monkeypatch)
    yield made
    made.close()
    eyes_module.eyes.cache_clear()


def train_until(sides: tuple, wanted: str, said: list[str]) -> None:
    """Train until a line says so; plain and adapted never differ."""
    for _ in range(MOST_STEPS):
        if any(wanted in line for line in said):
            return
        train(sides, 1)
        pool.settle(pool.current())  # type: ignore[arg-type]
    raise AssertionError(f"nobody said {wanted!r} within {MOST_STEPS} steps, but {said}")


def test_a_tenant_comes_and_goes(load: Load, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides = both()
    plan, _ = until_decided(sides)
    cached = [path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")]
    load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
    clock.us = {"serial": 1100.0, "workers, 3 lanes": 3000.0, "workers, 2 lanes": 2500.0}
    train_until(sides, "another process on the GPU (pid 77, 2048 MiB): tries", said)
    train_until(sides, "keeps serial: 1.10 ms", said)
    (kept,) = plans._saved.graphs.values()
    assert str(kept.plan) == plan, "what a load made of it is not for other runs"
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")] == cached
    load.sample = QUIET
    clock.us = {"serial": 1000.0, "workers, 3 lanes": 500.0}
    train_until(sides, "process 77 left the GPU: back to workers, 3 lanes", said)
    train(sides, 5)
    lines = list(trace.read(tmp_path / "trace.jsonl"))
    decisions = [line.plan for line in lines if isinstance(line, trace.Decided)]
    assert decisions == ["workers, 3 lanes", "serial", "workers, 3 lanes"]
    assert any(isinstance(line, trace.Stepped) and line.us > 400 for line in lines)


def test_a_memory_hog_never_makes_the_run_fail(load: Load, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides = both()
    until_decided(sides)
    load.sample = with_(QUIET, memory_used_mib=79_500)
    train_until(sides, "memory is short (500 of 80000 MiB free): takes", said)
    train(sides, 5)
    load.sample = QUIET
    train_until(sides, "memory is enough again (76000 of 80000 MiB free): back to workers, 3 lanes", said)
    train(sides, 10)


@pytest.fixture
def as_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[Trained, Trained]]]:
    """Makes a network, and a copy that is compiled in place and looks at the load in each call."""

    def make() -> tuple[Trained, Trained]:
        plain = Three().double()
        fast = copy.deepcopy(plain)
        in_place.compile_in_place(fast)
        return trained(plain), trained(fast)

    monkeypatch.setattr(in_place, "LOOK_S", 0.0)
    dynamo = torch._dynamo.config
    with dynamo.patch({name: getattr(dynamo, name) for name in in_place.CHANGED}):
        yield make


def assert_rests(sides: tuple[Trained, Trained], rests: bool = True) -> None:
    """Whether calls are plain, without Dynamo."""
    entered = backend.calls.entered
    train(sides, 5)
    assert (backend.calls.entered == entered) == rests


def resting(make: Callable[[], tuple[Trained, Trained]], monkeypatch: pytest.MonkeyPatch) -> tuple[Trained, Trained]:
    """A network whose plain run was the fastest."""
    Timed(monkeypatch, {"serial": 500.0})
    sides = make()
    until_decided(sides)
    train(sides, 3)
    return sides


def test_a_plain_network_wakes_for_a_load(
    load: Load, as_launched: Callable[[], tuple[Trained, Trained]], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls go through Dynamo only while other plans are tried, or faster than the plain run."""
    clock = Timed(monkeypatch, {"serial": 500.0})
    sides = as_launched()
    until_decided(sides)
    for _ in range(2):
        train(sides, 3)
        assert_rests(sides)
        load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
        clock.us = {"serial": 3000.0, "workers, 5 lanes": 500.0}
        train_until(sides, "another process on the GPU (pid 77, 2048 MiB): tries", said)
        train_until(sides, "keeps workers, 5 lanes: 0.50 ms", said)
        calls = report.graphs[0].calls
        train(sides, 5)
        assert report.graphs[0].calls == calls + 5
        load.sample, clock.us = QUIET, {"serial": 500.0}
        train_until(sides, "process 77 left the GPU: back to serial", said)
        said.clear()


def test_a_plain_network_goes_back_to_its_lanes(
    load: Load, as_launched: Callable[[], tuple[Trained, Trained]], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a load the plain run was the fastest; once that is gone no trial is needed."""
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 5 lanes": 500.0})
    sides = as_launched()
    until_decided(sides)
    load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
    clock.us = {"serial": 600.0}
    train_until(sides, "keeps serial: 0.60 ms", said)
    train(sides, 3)
    calls = report.graphs[0].calls
    assert_rests(sides)
    load.sample, clock.us = QUIET, {"serial": 1000.0, "workers, 5 lanes": 500.0}
    train_until(sides, "process 77 left the GPU: back to workers, 5 lanes", said)
    train(sides, 5)
    assert report.graphs[0].calls >= calls + 4


@pytest.mark.slow
def test_a_plain_network_rests_again_where_nothing_can_be_tried(
    load: Load,
    as_launched: Callable[[], tuple[Trained, Trained]],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers do not get ready for a trial in time."""
    sides = resting(as_launched, monkeypatch)
    ready = Variant.is_ready
    monkeypatch.setattr(Variant, "is_ready", lambda self: self.is_plain and ready(self))
    load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
    train(sides, 60)
    assert_rests(sides, rests=False)
    train(sides, int(adapt.PREPARE_S / 0.1))
    assert_rests(sides)
    assert not any("tries" in line for line in said)


def test_networks_of_one_kind_rest_together(
    load: Load, as_launched: Callable[[], tuple[Trained, Trained]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Timed(monkeypatch, {"serial": 500.0})
    first, second = as_launched(), as_launched()
    until_decided(first)
    for sides in (first, second):
        train(sides, 3)
        assert_rests(sides)
    assert len(report.graphs) == 1


def test_evaluation_does_not_wake_a_plain_network(
    load: Load, as_launched: Callable[[], tuple[Trained, Trained]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = resting(as_launched, monkeypatch)
    load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
    entered = backend.calls.entered
    with torch.no_grad():
        for _ in range(50):
            sides[1].model(torch.randn(5, 6, dtype=torch.float64))
    assert backend.calls.entered == entered


def test_an_error_beside_a_call_leaves_the_network_plain(
    load: Load,
    as_launched: Callable[[], tuple[Trained, Trained]],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = resting(as_launched, monkeypatch)

    def broken(_tuning: Tuning) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Tuning, "tend", broken)
    assert_rests(sides)
    assert sum("it runs in the lead (OutOfMemoryError: planted)" in line for line in said) == 1
    assert_rests(sides)


def test_a_network_that_is_dropped_is_not_watched_any_more(
    load: Load, as_launched: Callable[[], tuple[Trained, Trained]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Timed(monkeypatch, {"serial": 500.0})
    sides = as_launched()
    until_decided(sides)
    last = weakref.ref(tuning_module._tuning())  # type: ignore[arg-type, misc]
    rests = report.graphs[0].rests
    del sides
    torch._dynamo.reset()
    gc.collect()
    assert last() is None
    assert rests is not None
    assert rests()


def test_steps_before_a_trial_run_under_the_old_plan(
    load: Load, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To make the other candidates ready again costs no plain step."""
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides = both()
    until_decided(sides)
    train(sides, 3)
    begin = len(clock.names)
    load.sample = with_(QUIET, slowed_by=("power brake",))
    calls, steps = report.graphs[0].calls, 0
    while not any("clocks lowered by power brake: tries" in line for line in said):
        train(sides, 1)
        steps += 1
        assert steps < MOST_STEPS
    assert set(clock.names[begin:]) == {"workers, 3 lanes"}
    assert report.graphs[0].calls - calls >= steps - 1, "the last one may be the first of the trial, and serial"


def test_a_trial_waits_until_all_can_run(load: Load, said: list[str]) -> None:
    can_run = False
    tuning = Tuning("a network", contenders((-1,), (1, 2)), "cpu", lambda _chosen: None, lambda: can_run)
    tuning.settle(2)
    for call in range(MOST_STEPS):
        tuning.step(call, [])
        load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
        if tuning.wants_candidates:
            break
    tuning.prepared()
    assert (tuning.decided, tuning.wants_candidates) == (2, True)
    can_run = True
    tuning.prepared()
    assert (tuning.decided, tuning.wants_candidates) == (None, False)


def test_adapt_off_looks_at_nothing(load: Load, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(config.current(), adapt="off", trace=None)
    monkeypatch.setattr(config, "current", lambda: settings)
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides = both()
    until_decided(sides)
    steps = len(clock.names)
    load.sample = with_(QUIET, tenants=(Tenant(77, 2048),))
    train(sides, 100)
    assert len(clock.names) == steps
    assert not any("tries" in line for line in said)


SCRIPT = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        return torch.tanh(self.a(x)) + torch.sigmoid(self.b(x))

model = Two()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
import time
for step in range(60):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    time.sleep(0.02)
"""


def test_the_launcher_samples_for_a_script(tmp_path: Path) -> None:
    """From the command line: the lead names its device, and the launcher's samples are in the trace."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mpsrun", "--lanes", "workers", "--workers", "1", "--trace", "t.jsonl", "train.py"]
    environ = with_package(os.environ)
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    samples = trace.samples(trace.read(tmp_path / "t.jsonl"))
    assert len(samples) >= 3
    assert {sample.problem for sample in samples} == {"no GPU"}
    assert all((sample.host_available_mib or 0) > 0 for sample in samples)


def test_a_recorded_trace_is_replayed(tmp_path: Path) -> None:
    """What the monitor recorded leads to the same decisions again."""
    path = tmp_path / "trace.jsonl"
    made = trace.Trace(path)
    for number in range(200):
        tenants = (Tenant(9, 512),) if 60 <= number < 120 else ()
        made.add(trace.Sampled(with_(QUIET, at_s=number * 0.1, tenants=tenants)))
    made.close()
    watched, loads = adapt.Watched(), []
    for sample in trace.samples(trace.read(path)):
        watched = watched.seen(eyes_module.reading_of(sample), sample.at_s)
        loads.append(sorted(watched.load.tenants))
    changes = [number for number in range(1, 200) if loads[number] != loads[number - 1]]
    assert changes == [70, 150]
    assert json.loads(path.read_text().splitlines()[60])["sample"]["tenants"] == [[9, 512]]
