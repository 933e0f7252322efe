"""Workers that compile for longer than the watchdog lets them compute, and one that never comes to an end."""

import dataclasses
import threading
import time

import pytest
from networks import Three
from transparency import on_lanes

from mpsrun import config
from mpsrun.run import watcher
from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import BACK_S, Orders, Training, batch
from tests.faults.workers.hook.sitecustomize import LINGER_S


@pytest.fixture
def compiling(lively: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    settings = dataclasses.replace(lively.settings, compile_branches=True)
    monkeypatch.setattr(config, "current", lambda: settings)
    return lively


def test_a_long_compilation(lively: Coordinator, orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is lost: what runs already goes on in the lead, and a backward that is due waits."""
    training = Training(lively)
    for _ in range(3):
        training.step()
    losses = lively._watcher.losses
    output = training.model(batch(0)).square().mean()
    settings = dataclasses.replace(lively.settings, compile_branches=True)
    monkeypatch.setattr(config, "current", lambda: settings)
    orders.give(1, "compile", "linger")
    other = on_lanes(Three(16).double(), 2)
    thread = threading.Thread(target=lambda: other(batch(1)))
    start = time.monotonic()
    thread.start()
    while not any(link.compiles for link in lively.links):
        assert time.monotonic() < start + BACK_S
        time.sleep(0.01)
    before = lively.links[0].last
    training.model(batch(0))
    assert lively.links[0].last == before, "a worker that compiles is not asked for more"
    output.backward()
    thread.join(BACK_S)
    assert not thread.is_alive()
    assert time.monotonic() - start > LINGER_S
    assert orders.are_followed()
    assert lively._watcher.losses == losses
    training.step()
    assert lively.links[0].last > before


@pytest.mark.slow
def test_one_without_an_end(compiling: Coordinator, orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is lost, and another one compiles in its place."""
    monkeypatch.setattr(watcher, "COMPILE_S", 2 * LINGER_S)
    generation = compiling.links[0].generation
    orders.give(1, "compile", "hang")
    training = Training(compiling)
    training.steps_until(lambda: training.works_in(1, generation + 1), 2 * LINGER_S + 2 * BACK_S)
    training.assert_undisturbed()
