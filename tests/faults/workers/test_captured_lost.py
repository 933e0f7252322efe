"""Workers that are lost in the middle of a replay: what waits for them is released, and the curve is the same."""

import time
from collections.abc import Iterator

import pytest
from captures import noted

from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing
from mpsrun.run.relay import Relay
from tests.faults.workers.conftest import BACK_S, SPARE_S, WATCHDOG_S, Orders, Training

LANES = "captured-workers"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Captured]]:
    """All captured graphs of a test."""
    found = noted(monkeypatch)
    yield found
    found.clear()


def test_a_lead_that_takes_long_is_waited_for(
    lively: Coordinator, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker waits for the lead's own work inside of a replay: it owes nothing meanwhile."""
    training = Training(lively, LANES)
    for _ in range(5):
        training.step()
    release, asked = Relay.release, []

    def late(self: Relay, crossing: Crossing) -> None:
        asked.append(crossing)
        if len(asked) == 1:
            time.sleep(1.5 * WATCHDOG_S)
        release(self, crossing)

    monkeypatch.setattr(Relay, "release", late)
    training.step()
    assert len(asked) == 2
    training.assert_undisturbed()
    assert lively.present() == [1, 2]


@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("forward", "SIGKILL"),
        ("backward", "exception"),
        ("forward", "hang"),
        ("between", "exit"),
        pytest.param("backward", "SIGKILL", marks=pytest.mark.slow),
        pytest.param("forward", "exception", marks=pytest.mark.slow),
        pytest.param("backward", "SIGSTOP", marks=pytest.mark.slow),
        pytest.param("forward", "OOM", marks=pytest.mark.slow),
    ],
)
def test_the_worker_comes_back(
    lively: Coordinator, orders: Orders, made: list[Captured], phase: str, fault: str
) -> None:
    """And with the new process the network is recorded anew."""
    training, generation = Training(lively, LANES), lively.links[0].generation
    for _ in range(5):
        training.step()
    assert made[0].replays == 3
    training.longest_s = 0.0
    orders.give(1, phase, fault)
    if phase == "between":
        lively.counts(timeout_s=0.1)
    training.steps_until(orders.are_followed, SPARE_S)
    training.steps_until(lambda: training.works_in(1, generation + 1), WATCHDOG_S + BACK_S)
    before = made[0].replays
    training.steps_until(lambda: made[0].replays >= before + 4, SPARE_S)
    assert training.longest_s < WATCHDOG_S + SPARE_S
    training.assert_undisturbed()
    assert lively.present() == [1, 2]
