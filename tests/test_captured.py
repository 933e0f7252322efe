"""Captured lanes: everything around a recording. On a CPU a replay computes anew; what is recorded is for tests/gpu."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from captures import (
    Heads,
    Pair,
    assert_settings_are_followed,
    assert_transparent,
    evaluation,
    gradient_penalty,
    inputs,
    kept_graph,
    kept_results,
    noted,
    on_captured,
    saved_plan,
    step,
    three,
    train_pinned,
    two_forwards,
)
from networks import SMALL, Three
from torch import Tensor, nn

from mpsrun import config
from mpsrun.run import captured, replay, report, verify
from mpsrun.run.captured import Captured
from mpsrun.run.recorder import Repeater
from mpsrun.run.special import Planner

TWICE = "backward through the graph a second time"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test."""
    return noted(monkeypatch)


def verify_steps(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Have `steps` calls of everything that is compiled from now on verified."""
    settings = dataclasses.replace(config.current(), verify=steps)
    patch.setattr(config, "current", lambda: settings)
    patch.setattr(verify, "_all", [])
    patch.setattr(verify, "_said", False)


def pair_of(make: Callable[[], nn.Module] = three) -> Pair:
    return Pair(on_captured, make, calls=3)


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks(made: list[Captured], name: str) -> None:
    assert_transparent(name, on_captured, made)


def test_several_forwards_before_a_backward(made: list[Captured]) -> None:
    pair = pair_of()
    before = made[0].replays
    pair.both(two_forwards)
    assert made[0].replays == before + 2


def test_more_forwards_than_recordings_may_be(made: list[Captured]) -> None:
    """The others run as they are."""

    def many(model: nn.Module) -> Tensor:
        outputs = [model(inputs(seed)) for seed in range(captured.MOST_AT_ONCE + 3)]
        torch.stack(outputs).prod(0).sum().backward()
        return outputs[0]

    pair = pair_of()
    before = made[0].replays
    for _ in range(2):
        pair.both(many)
    assert made[0].replays == before + 2 * captured.MOST_AT_ONCE
    assert len(made[0]._bodies) == captured.MOST_AT_ONCE


def test_a_recording_that_is_not_needed_any_more_is_dropped(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "MOST_IDLE", 5)
    pair = pair_of()
    pair.both(two_forwards)
    for _ in range(5):
        pair.both(step)
    assert len(made[0]._bodies) == 2
    pair.both(step)
    assert len(made[0]._bodies) == 1
    pair.both(two_forwards)
    assert len(made[0]._bodies) == 2


def test_no_room_for_a_second_recording(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first one stays."""
    pair = pair_of()

    def full(_recorder: Repeater) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Repeater, "make_room", full)
    before = made[0].replays
    for _ in range(3):
        pair.both(two_forwards)
    pair.both(step)
    assert made[0].replays == before + 4
    assert "captured" not in capfd.readouterr().err


def test_outputs_and_gradients_stay_valid(made: list[Captured]) -> None:
    pair = pair_of()
    pair.both(kept_results)
    assert made[0].replays == 4


def test_loss_kept_from_the_last_step(made: list[Captured]) -> None:
    """A loop's variables hold the last step's graph while the next one is computed."""
    pair = pair_of()
    loss = pair.fast(inputs()).sum()
    loss.backward()
    before = made[0].replays
    again = pair.fast(inputs()).sum()
    assert made[0].replays == before + 1
    assert loss.grad_fn is not again.grad_fn


def test_retain_graph_and_a_second_backward() -> None:
    def twice(model: nn.Module) -> Tensor:
        output = model(inputs())
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        with pytest.raises(RuntimeError, match=TWICE):
            output.sum().backward()
        return output

    pair_of().both(twice)


def test_outputs_of_two_optimizers(made: list[Captured]) -> None:
    """One head steps before the other one's backward, which reads nothing of it."""

    def in_turn(model: nn.Module) -> None:
        model.zero_grad()
        left, right = model(inputs(2))
        left.square().sum().backward()
        with torch.no_grad():
            for p in model.left.parameters():  # type: ignore[union-attr]
                p.sub_(0.01 * p.grad)
        right.square().sum().backward()

    def too_early(model: nn.Module) -> None:
        left, right = model(inputs(2))
        with torch.no_grad():
            model.right.head.weight.mul_(2)  # type: ignore[union-attr, operator]
        left.square().sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            right.square().sum().backward()

    pair = Pair(on_captured, Heads, calls=0)
    for _ in range(4):
        pair.both(in_turn)
    pair.both(too_early)
    assert made[0].replays == 3


def test_inputs_without_versions(made: list[Captured]) -> None:
    """Backward may not read an inference tensor, but forward may."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = three()

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.body(x) + shift

    def use(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            shift = inputs(3)[:, :2].clone()
        output = model(inputs(2), shift)
        output.sum().backward()
        return output

    pair = Pair(on_captured, Shifted, calls=0)
    for _ in range(5):
        pair.both(use)
    assert made[0].replays == 3


def test_a_graph_that_is_kept_is_not_overwritten(made: list[Captured]) -> None:
    pair = pair_of()
    before = made[0].replays
    pair.both(kept_graph)
    assert made[0].replays == before + 2


def test_a_graph_that_is_dropped_frees_the_recording(made: list[Captured]) -> None:
    pair = pair_of()
    before = made[0].replays
    output = pair.fast(inputs())
    del output
    gc.collect()
    pair.fast(inputs())
    assert made[0].replays == before + 2


def test_gradients_of_inputs_and_of_gradients() -> None:
    pair_of().both(gradient_penalty)


def test_gradients_accumulate() -> None:
    def accumulate(model: nn.Module) -> None:
        for seed in range(3):
            model(inputs(seed)).square().sum().backward()

    pair_of().both(accumulate)


def test_evaluation_between_steps(made: list[Captured]) -> None:
    pair_of().both(evaluation)
    assert [graph.replays for graph in made] == [2, 2, 2]


def test_weights_changed_between_forward_and_backward() -> None:
    def change(model: nn.Module) -> None:
        output = model(inputs())
        with torch.no_grad():
            model.paths[0][2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        model.zero_grad()  # plain PyTorch has those of the layers behind it by then

    pair_of(lambda: Deep(6)).both(change)


class Deep(nn.Module):
    """Two branches of two layers, so that weights are needed in backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        return torch.cat([path(y) for path in self.paths], 1)


class Counting(nn.Module):
    """Writes a buffer in place, and needs what it wrote in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Three(8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.body(x) * self.steps


def test_a_buffer_that_is_written_and_then_needed(made: list[Captured]) -> None:
    pair = pair_of(Counting)
    pair.both(lambda model: model(inputs()).square().sum().backward())
    assert made[0].replays == 2


def test_parameters_that_move(made: list[Captured]) -> None:
    pair = pair_of()

    def move(model: nn.Module) -> Tensor:
        for p in model.parameters():
            p.data = p.data.clone() * 2
        output = model(inputs())
        output.sum().backward()
        return output

    pair.both(move)
    for _ in range(captured.MOST_RECORDINGS + 1):
        pair.both(move)
    assert made[0].replays == captured.MOST_RECORDINGS, "after so many moves it is not recorded again"


def test_freezing(made: list[Captured]) -> None:
    def freeze(model: nn.Module) -> Tensor:
        for p in list(model.parameters())[:2]:
            p.requires_grad_(not p.requires_grad)
        model.zero_grad()
        for _ in range(3):
            output = model(inputs())
            output.square().sum().backward()
        return output

    pair = pair_of()
    pair.both(freeze)
    pair.both(freeze)


def test_settings_are_followed(made: list[Captured]) -> None:
    assert_settings_are_followed(pair_of(), made)


def test_what_cannot_be_recorded_runs_uncaptured(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        era, has_workers = 0, False

        def make_room(self) -> None:
            raise torch.OutOfMemoryError("no memory for a recording")

    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda device: Full())
    pair = pair_of()
    pair.both(lambda model: model(inputs()).sum().backward())
    assert made[0].replays == 0


def test_input_written_in_place_is_refused(made: list[Captured]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Three(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.mul_(2))

    def use(model: nn.Module) -> Tensor:
        x = inputs()
        output = model(x)
        output.sum().backward()
        return x

    pair_of(Writes).both(use)
    assert made == []
    assert any("writes its input" in text for graph in report.graphs for text in graph.refusals)


def test_verified_steps(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    verify_steps(monkeypatch, 3)
    fast = on_captured(Three(8).double())
    for _ in range(5):
        fast(inputs()).square().sum().backward()
    verify.say_rest()
    assert "verified 3 steps of a network" in capfd.readouterr().err
    assert made[0].replays == 3


def test_a_wrong_replay_is_found(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    verify_steps(monkeypatch, 3)
    monkeypatch.setattr(replay, "_copied", lambda output: output.detach() + 1e-3)
    fast = on_captured(Three(8).double())
    for _ in range(2):
        fast(inputs()).square().sum().backward()
    with pytest.raises(SystemExit) as ended:
        fast(inputs())
    assert ended.value.code == verify.EXIT_STATUS


def test_a_captured_plan_is_pinned(made: list[Captured], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    assert "captured\nregion 0: stream 1 | stream 2 | stream 3\n" in saved_plan(monkeypatch, path, on_captured)
    for captures, replays in ((True, [2]), (False, [])):
        monkeypatch.setattr(Planner, "captures", captures)
        monkeypatch.setattr(Planner, "has_streams", True)
        made.clear()
        train_pinned(monkeypatch, path)
        assert [graph.replays for graph in made] == replays
