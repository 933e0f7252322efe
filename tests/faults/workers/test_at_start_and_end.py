"""Faults of workers that are not there yet, and of workers that are told to end."""

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pool
import pytest

from mpsrun import config
from mpsrun.config import Config
from mpsrun.launch.ending import KILL_S, TERMINATE_S
from mpsrun.run.session import END_DEADLINE_S
from tests.faults.workers.conftest import BACK_S, SPARE_S, Orders, Training

START_S = 15.0


def settings(workers: int) -> Config:
    return Config(workers=workers, lanes="workers", timeout_s=10.0)


@pytest.mark.parametrize("phase", ["start", pytest.param("startup", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(("SIGKILL", "exception"), id="two"),
        pytest.param(("SIGSEGV", "exit", "OOM", "SIGSTOP", "hang", "spin"), id="six", marks=pytest.mark.slow),
    ],
)
def test_at_the_start(
    orders: Orders, faults: Sequence[str], phase: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """`startup`: before it said that it is there; `start`: when it was told which device to open.

    The script trains meanwhile, and each worker is there in the end.
    """
    monkeypatch.setattr(config, "START_S", START_S)
    for worker, fault in enumerate(faults, start=1):
        orders.give(worker, phase, fault)
    with pool.running(settings(len(faults)), healthy=False) as coordinator:
        training = Training(coordinator)
        everybody = list(range(1, len(faults) + 1))
        training.steps_until(
            lambda: coordinator.present() == everybody and all(link.started for link in coordinator.links),
            2 * START_S + BACK_S,
        )
        assert [link.generation for link in coordinator.links] == [1] * len(faults)
        training.steps_until(lambda: training.works_in(1, 1), BACK_S)
        training.assert_undisturbed()
        assert training.longest_s < START_S
    told = capfd.readouterr().err
    for worker in everybody:
        assert told.count(f"worker {worker} is out") == 1


def test_workers_start_when_a_region_needs_them(orders: Orders) -> None:
    """Until then they open no device, also one that came in the place of another."""
    coordinator = pool.start(settings(2), begin=False)
    first = coordinator.links[0]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    pool.wait_until(lambda: first.lost is not None, BACK_S)
    pool.wait_until(lambda: (coordinator.admit(), coordinator.links[0].generation == 1)[1], BACK_S)
    coordinator.trim()
    assert coordinator.counts() == {}
    assert not any(link.called or link.started for link in coordinator.links)
    training = Training(coordinator)
    training.steps_until(lambda: training.works_in(1, 1) and training.works_in(2, 0), BACK_S)
    training.assert_undisturbed()
    pool.stop()


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(("SIGKILL", "exception", "OOM"), id="three"),
        pytest.param(("SIGSEGV", "exit", "SIGSTOP", "hang", "spin"), id="five", marks=pytest.mark.slow),
    ],
)
def test_at_the_end(orders: Orders, faults: Sequence[str], capfd: Any) -> None:
    """The lead has told them to end: nobody is started again, nothing is said, nothing is left."""
    coordinator = pool.start(settings(len(faults)))
    training = Training(coordinator)
    for _ in range(3):
        training.step()
    for worker, fault in enumerate(faults, start=1):
        orders.give(worker, "shutdown", fault)
    start = time.monotonic()
    pool.stop()
    assert time.monotonic() - start < END_DEADLINE_S + TERMINATE_S + KILL_S + SPARE_S
    assert orders.are_followed()
    assert "is out" not in capfd.readouterr().err
