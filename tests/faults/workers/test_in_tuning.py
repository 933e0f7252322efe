"""A worker that is lost, or has no memory, while plans are tried: the right one is kept in the end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pool
import pytest
from tuned import Timed, auto_lanes

from mpsrun.plan import tuner
from mpsrun.run import plans, report
from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import BACK_S, WATCHDOG_S, Orders, Training
from tests.faults.workers.test_lost_and_back import FAULTS

WORKERS = "workers, 3 lanes"


@pytest.fixture
def auto(lively: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Coordinator]:
    with auto_lanes(lively, monkeypatch, tmp_path):
        yield lively


def until_tried(training: Training, clock: Timed) -> None:
    """Train until steps in workers are timed, while nothing is decided."""
    training.steps_until(lambda: WORKERS in clock.names, BACK_S)
    assert not plans._saved.graphs


def kept() -> str:
    (graph,) = plans._saved.graphs.values()
    return str(graph.plan)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault == "SIGKILL" else pytest.mark.slow) for fault in FAULTS],
)
def test_tuning_waits_for_the_worker(
    auto: Coordinator, orders: Orders, fault: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Its absence is not held against the plan, which is followed in the end."""
    clock = Timed(monkeypatch, {"serial": 1000.0, WORKERS: 500.0})
    training, generation = Training(auto, lanes="auto"), auto.links[0].generation
    until_tried(training, clock)
    orders.give(1, "between" if fault == "cut" else "forward", fault)
    for _ in range(2):  # the second time something is on a socket that is cut
        auto.counts(timeout_s=0.1)
    training.steps_until(lambda: auto.links[0].lost is not None, WATCHDOG_S + BACK_S)
    training.step()
    timed = len(clock.names)
    training.steps_until(lambda: auto.links[0].generation > generation, BACK_S)
    assert len(clock.names) == timed, "steps without the worker are not compared"
    training.steps_until(lambda: bool(plans._saved.graphs), BACK_S)
    assert "worker 1" in kept()
    assert len(clock.names) <= tuner.MAX_STEPS
    training.steps_until(lambda: training.works_in(1, generation + 1), BACK_S)
    training.assert_undisturbed()
    assert f"worker 1 is out: {FAULTS[fault].partition('{')[0]}" in capfd.readouterr().err


def test_a_candidate_without_memory_is_dropped(
    auto: Coordinator, orders: Orders, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    clock = Timed(monkeypatch, {"serial": 1000.0, WORKERS: 500.0})
    training = Training(auto, lanes="auto")
    until_tried(training, clock)
    orders.give(1, "forward", "OOM")
    training.steps_until(lambda: bool(plans._saved.graphs), BACK_S)
    assert orders.are_followed()
    lanes = len({*kept().partition(": ")[2].strip().split(" | ")})
    assert lanes < 3, "the plan that had no memory is not the one"
    training.assert_undisturbed()
    assert pool.lost(auto) == {}
    told = capfd.readouterr().err
    assert f"no memory for {WORKERS}" in told or "drops" in told or "keeps" in told
    assert told.count("no memory in worker 1: planted") == 1
    assert report.graphs
