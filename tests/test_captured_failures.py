"""Recordings beside each other: one that fails, which voids all others, and the order of their replays."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from captures import Failing, Pair, noted, on_captured, step, three, two_forwards
from torch import Tensor, nn

from mpsrun.run import arguments, captured, replay
from mpsrun.run.captured import NO_THRIFT, Captured
from mpsrun.run.recorder import Recording, Repeater
from mpsrun.run.replay import Body, Thrift


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    return noted(monkeypatch)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """What all networks are recorded with."""
    found = Failing()
    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda _device: found)
    return found


class Other(nn.Module):
    """A graph of its own for each number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left, self.right, self.number = three(), three(), number

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.number * self.right(x)


def test_it_is_tried_once(made: list[Captured], recorder: Failing, capfd: pytest.CaptureFixture[str]) -> None:
    recorder.next_is_bad = lambda: True
    Pair(on_captured, three, calls=6)
    assert (made[0].replays, recorder.failures) == (1, 1)
    assert isinstance(made[0].failure, RuntimeError)
    assert "RuntimeError: operation not permitted" in capfd.readouterr().err


@pytest.mark.parametrize("times", [captured.MOST_ENDED, captured.MOST_ENDED + 1])
def test_what_another_thread_ended_is_tried_again(
    times: int, made: list[Captured], recorder: Failing, capfd: pytest.CaptureFixture[str]
) -> None:
    """As often as that is likely to be by chance."""
    recorder.says = "CUDA error: operation failed due to a previous error during capture"
    recorder.next_is_bad = lambda: recorder.failures < times
    Pair(on_captured, three, calls=16)
    assert recorder.failures == times
    gave_up = times > captured.MOST_ENDED
    assert (made[0].failure is not None) == gave_up
    assert ("it runs uncaptured" in capfd.readouterr().err) == gave_up
    assert gave_up or made[0].replays > times + 1


def test_other_networks_are_recorded_anew(made: list[Captured], recorder: Failing) -> None:
    """As often as recordings fail: they have not moved, and lose a call or two each time."""
    good = Pair(on_captured, three, calls=4)
    for number in range(captured.MOST_RECORDINGS + 1):
        recorder.next_is_bad = lambda: True
        Pair(on_captured, lambda number=number: Other(number), calls=4)
        recorder.next_is_bad = lambda: False
        good.both(step)
        good.both(step)
    assert recorder.failures == captured.MOST_RECORDINGS + 1
    before = made[0].replays
    good.both(step)
    assert (made[0].replays, made[0].failure) == (before + 1, None)


def test_with_thrift_it_goes_back_to_a_recording_without(
    made: list[Captured], recorder: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "STEPS_BEFORE_THRIFT", 2)
    bodies: list[Thrift] = []
    init = Body.__init__

    def note(self: Body, *args: object) -> None:
        bodies.append(args[-1])
        init(self, *args)

    monkeypatch.setattr(replay.Body, "__init__", note)
    recorder.next_is_bad = lambda: bodies[-1].frees
    Pair(on_captured, three, calls=14)
    assert bodies == [NO_THRIFT, Thrift(frees=True, lends=True), NO_THRIFT]
    assert (made[0].failure, recorder.failures) == (None, 1)
    assert made[0].replays == 11


def test_of_two_calls_at_once_the_first_is_replayed(made: list[Captured], recorder: Failing) -> None:
    forwards: list[None] = []

    def second() -> bool:
        forwards.append(None)
        return len(forwards) == 2

    recorder.next_is_bad = second
    pair = Pair(on_captured, three, calls=0)
    for _ in range(8):
        pair.both(two_forwards)
    assert (made[0].failure, recorder.failures) == (None, 1)
    before = made[0].replays
    for _ in range(3):
        pair.both(two_forwards)
    assert made[0].replays == before + 3


def test_what_a_replay_has_read_is_overwritten_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream the last one was submitted to: this one waits before its inputs and gradients are copied."""
    told: list[str] = []

    class Told(Repeater):
        def follow(self) -> None:
            told.append("waits")

        def record(self, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
            def replayed() -> Any:
                told.append("replays")
                return function()

            return super().record(replayed, forward)

    copy_all = replay.copy_all

    def copied(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        told.append("copies")
        copy_all(targets, sources)

    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda _device: Told())
    for module in (arguments, replay):
        monkeypatch.setattr(module, "copy_all", copied)
    Pair(on_captured, three, calls=4)
    assert told == ["waits", "copies", "replays"] * 4, "a forward and a backward in each of two steps"
