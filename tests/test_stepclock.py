"""What a step is, and how it is timed on a GPU, with events of the test's own."""

import pytest
import torch
from torch import nn

from mpsrun.run import stepclock
from mpsrun.run.stepclock import MOST_AHEAD, MOST_CALLS, StepClock


class Device:
    """A GPU that gets one step done in each nap of the host; `begun` steps were launched."""

    def __init__(self) -> None:
        self.begun = self.done = self.naps = 0

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)

    def nap(self, _s: float) -> None:
        self.naps += 1
        self.done += 1


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.number = device, 0

    def record(self) -> None:
        self.device.begun += 1
        self.number = self.device.begun

    def query(self) -> bool:
        return self.number <= self.device.done

    def elapsed_time(self, end: "Event") -> float:
        return 2.0 * (end.number - self.number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(stepclock.torch.cuda, "Event", made.event)
    monkeypatch.setattr(stepclock.time, "sleep", made.nap)
    return made


def launch(clock: StepClock, candidates: range) -> None:
    for candidate in candidates:
        clock.start(candidate)


def test_steps_are_told_once_they_are_through(device: Device) -> None:
    clock = StepClock("cuda")
    launch(clock, range(4))
    assert clock.periods() == []
    device.done = 2
    assert clock.periods() == [(0, 2000.0)]
    device.done = 4
    assert clock.periods() == [(1, 2000.0), (2, 2000.0)]


def test_the_host_waits_until_the_gpu_is_close_behind(device: Device) -> None:
    clock = StepClock("cuda")
    launch(clock, range(10))
    clock.catch_up()
    assert (device.begun, device.done) == (10, 11 - MOST_AHEAD), "of the step before the last one the start has passed"
    clock.catch_up()
    assert device.naps == 11 - MOST_AHEAD, "it is close enough"
    assert len(clock.periods()) == 10 - MOST_AHEAD


def test_a_gpu_that_never_comes_is_not_waited_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(10**6))
    monkeypatch.setattr(stepclock.time, "monotonic", lambda: next(now_s))
    monkeypatch.setattr(stepclock.time, "sleep", lambda _s: None)
    clock = StepClock("cuda")
    launch(clock, range(10))
    clock.catch_up()
    assert next(now_s) < 100
    assert clock.periods() == []


def test_an_interrupted_step_is_not_timed(device: Device) -> None:
    clock = StepClock("cuda")
    launch(clock, range(2))
    clock.interrupt()
    launch(clock, range(2, 4))
    device.done = 4
    assert [candidate for candidate, _ in clock.periods()] == [0, 2]


def call(clock: StepClock, model: nn.Module) -> torch.Tensor:
    output = model(torch.ones(2, 3))
    clock.called((output, 3, output.detach()))
    return output


def test_calls_before_a_backward_are_one_step() -> None:
    clock, model = StepClock("cpu"), nn.Linear(3, 3)
    assert not clock.is_amid()
    for _ in range(3):
        clock.start(0)
        first = call(clock, model)
        assert clock.is_amid()
        second = call(clock, model)
        assert clock.is_amid()
        (first * second).sum().backward()
        assert not clock.is_amid()


def test_a_call_without_a_backward_to_come_is_a_step() -> None:
    clock, model = StepClock("cpu"), nn.Linear(3, 3)
    with torch.no_grad():
        call(clock, model)
    assert not clock.is_amid()
    output = call(clock, model)
    del output
    assert not clock.is_amid(), "its graph is dropped"


def test_a_backward_that_never_comes_is_not_waited_for() -> None:
    """Each call is a step then."""
    clock, model = StepClock("cpu"), nn.Linear(3, 3)
    kept, steps = [], 0
    for _ in range(MOST_CALLS + 10):
        if not clock.is_amid():
            clock.start(0)
            steps += 1
        kept.append(call(clock, model))
    assert steps == 10


def test_many_calls_before_a_backward_are_one_step() -> None:
    clock, model = StepClock("cpu"), nn.Linear(3, 3)
    steps = 0
    for _ in range(3):
        outputs = []
        for _ in range(40):
            if not clock.is_amid():
                clock.start(0)
                steps += 1
            outputs.append(call(clock, model))
        torch.stack(outputs).sum().backward()
    assert steps == 3


def test_what_outlives_a_step_has_one_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a network returns an input that was computed once, for many steps."""
    seen: list[object] = []
    monkeypatch.setattr(stepclock._Pending, "__call__", lambda self, gradients: seen.append(self))
    kept = nn.Linear(2, 2)(torch.ones(1, 2))
    clock = StepClock("cpu")
    for _ in range(5):
        clock.called([kept, torch.ones(1)])
    kept.sum().backward()
    assert len(seen) == 1
