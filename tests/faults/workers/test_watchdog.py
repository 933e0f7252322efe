"""The report of a wait that runs out: who waited for what, and where every process was."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mpsrun.run import watchdog
from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import BACK_S, SPARE_S, WATCHDOG_S, Orders, Training


@pytest.mark.parametrize(
    ("fault", "status", "stack", "kept"),
    [
        pytest.param("hang", "sleeping", "in <lambda>", False, id="in C", marks=pytest.mark.slow),
        pytest.param("spin", "running", "in spinning", True, id="in Python"),
        pytest.param("SIGSTOP", "stopped", "(it wrote none)", False, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_report(
    lively: Coordinator,
    orders: Orders,
    fault: str,
    status: str,
    stack: str,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: Any,
) -> None:
    """Into the log directory where there is one (`kept`), else to stderr."""
    settings = dataclasses.replace(lively.settings, log_dir=tmp_path if kept else None)
    if kept:  # the workers write where they were told to when they started
        for link in lively.links:
            (tmp_path / f"worker-{link.index}.log").symlink_to(lively.settings.worker_log(link.index))
    monkeypatch.setattr(lively._watcher, "_settings", settings)
    training, link = Training(lively), lively.links[0]
    for _ in range(3):
        training.step()
    capfd.readouterr()
    orders.give(1, "backward", fault)
    training.step()
    last = link.last
    told = capfd.readouterr().err
    text = (tmp_path / "watchdog.log").read_text() if kept else told
    assert f"no answer from worker 1 within {WATCHDOG_S:g} s" in told
    assert not kept or f"all stacks and counters are in {tmp_path / 'watchdog.log'}" in told
    summary, *stacks = text.split("--- ")
    assert f"sequence number {last}" in summary
    (first,) = [line for line in summary.splitlines() if line.startswith("worker 1 ")]
    assert f"pid {link.pid}" in first
    assert f"the process is {status}" in first
    assert f"counter {link.done} at {last - 1}" in first
    assert f"owes backward {last}, the first for {WATCHDOG_S:.0f}." in first
    (second,) = [line for line in summary.splitlines() if line.startswith("worker 2 ")]
    assert "owes nothing" in second
    lead, worker_1, worker_2, _ = stacks
    assert "forkjoin.py" in lead, "where the script waits"
    assert "watcher.py" in lead
    assert stack in worker_1
    assert "ring.py" in worker_2, "it waits for something to do"
    assert training.longest_s < WATCHDOG_S + watchdog.STACKS_S + SPARE_S
    training.steps_until(lambda: training.works_in(1, link.generation + 1), BACK_S)


@pytest.mark.slow
def test_a_worker_that_does_not_prepare(lively: Coordinator, orders: Orders, capfd: Any) -> None:
    """Nobody waits for a result of its, and still it is noticed."""
    generation = lively.links[0].generation
    orders.give(1, "prepare", "hang")
    training = Training(lively)
    training.steps_until(lambda: training.works_in(1, generation + 1), 2 * WATCHDOG_S + BACK_S)
    training.assert_undisturbed()
    assert "prepares layouts" in capfd.readouterr().err
