"""Captured lanes: everything around a recording. On a CPU a replay computes anew; what is recorded is for tests/gpu."""

import copy
import dataclasses
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import noted, on_captured
from networks import SMALL, Three, why_not_here
from torch import Tensor, nn
from transparency import assert_same, moved, trained

from mpsrun import config
from mpsrun.plan.planfile import PlanFile
from mpsrun.run import backend, captured, keeping, plans, replay, report, verify
from mpsrun.run.captured import Captured
from mpsrun.run.replay import Thrift
from mpsrun.run.special import Planner

EXACT = {"rtol": 1e-9, "atol": 1e-11}
TWICE = "backward through the graph a second time"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test."""
    torch._dynamo.reset()
    report.graphs.clear()
    return noted(monkeypatch)


class Pair:
    """The same network plain and captured, both past their first calls."""

    def __init__(self, make: Callable[[], nn.Module] = lambda: Three(8)) -> None:
        torch.manual_seed(0)
        self.plain = make().double()
        self.fast = on_captured(copy.deepcopy(self.plain))
        for _ in range(3):
            self.both(lambda model: model(inputs()).square().sum().backward())

    def both(self, use: Callable[[nn.Module], object]) -> None:
        """Do the same with both and compare what it returns, all gradients and all buffers."""
        results = []
        for model in (self.plain, self.fast):
            torch.manual_seed(1)
            result = use(model)
            results.append([result] if isinstance(result, Tensor) else list(result or ()))
        for found, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, wanted, **EXACT)
        for p, q in zip(self.fast.parameters(), self.plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, **EXACT)
        for p, q in zip(self.fast.buffers(), self.plain.buffers(), strict=True):
            torch.testing.assert_close(p, q, **EXACT)


def inputs(seed: int = 1, rows: int = 5) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks(made: list[Captured], name: str) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().double())
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(5):
            given = tuple(moved(x, "cpu", torch.float64) for x in case.inputs())
            assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    assert [graph.replays for graph in made] == [3]


def test_several_forwards_before_a_backward(made: list[Captured]) -> None:
    pair = Pair()
    before = made[0].replays

    def siamese(model: nn.Module) -> Tensor:
        first, second = model(inputs(2)), model(inputs(3))
        (first * second).sum().backward()
        return first

    pair.both(siamese)
    assert made[0].replays == before + 1


def test_outputs_stay_valid(made: list[Captured]) -> None:
    pair = Pair()

    def keep(model: nn.Module) -> list[Tensor]:
        kept = []
        for seed in range(3):
            output = model(inputs(seed))
            output.sum().backward()
            kept.append(output.detach())
        return kept

    pair.both(keep)
    assert made[0].replays == 4


def test_loss_kept_from_the_last_step(made: list[Captured]) -> None:
    """A loop's variables hold the last step's graph while the next one is computed."""
    pair = Pair()
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

    Pair().both(twice)


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Thrift]:
    """The thrift of each forward that is recorded from now on."""
    found: list[Thrift] = []

    class Noted(replay.Body):
        def __init__(self, *args: Any) -> None:
            found.append(args[-1])
            super().__init__(*args)

    monkeypatch.setattr(captured, "Body", Noted)
    return found


def test_a_kept_graph_has_the_next_recording_keep_its_activations(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then backward uses their memory again, as in plain PyTorch."""
    bodies = recordings(monkeypatch)
    pair = Pair()
    assert bodies == [(True, True)]

    def twice(model: nn.Module) -> Tensor:
        output = model(inputs(2))
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        return output

    before = made[0].replays
    for _ in range(3):
        pair.both(twice)
    assert bodies == [(True, True), (False, True)]
    assert made[0].replays == before + 3


def test_outputs_whose_gradients_come_in_turn(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward of one output, then of another: the recording cannot have freed what the second one reads."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Three(8), Three(8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    bodies = recordings(monkeypatch)
    torch.manual_seed(0)
    plain = Heads().double()
    fast = on_captured(copy.deepcopy(plain))
    for step in range(6):
        for model in (plain, fast):
            model.zero_grad()
            left, right = model(inputs(step))
            left.sum().backward()
            right.square().sum().backward()
        for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **EXACT)
    assert bodies == [(True, True), (False, True)]
    assert made[0].replays == 4


@pytest.mark.parametrize("habit", ["keeps", "accumulates"])
def test_large_gradients_are_copied_once_one_was_kept(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, habit: str
) -> None:
    monkeypatch.setattr(keeping, "LARGE_BYTES", 0)
    bodies = recordings(monkeypatch)
    pair = Pair()
    kept: list[Tensor] = []

    def step(model: nn.Module, keeps: bool) -> list[Tensor]:
        if not (keeps and habit == "accumulates"):
            model.zero_grad()
        model(inputs(2)).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        kept.extend(grads if keeps and habit == "keeps" else ())
        return [grad.clone() for grad in grads]

    for _ in range(keeping.STEPS_BEFORE_LENDING + 3):
        pair.both(lambda model: step(model, False))
    assert bodies == [(True, True)]
    for _ in range(3):
        pair.both(lambda model: step(model, True))
    assert bodies == [(True, True), (True, False)]
    assert made[0].replays == 1 + keeping.STEPS_BEFORE_LENDING + 3 + 3


def test_a_graph_that_is_kept_is_not_overwritten(made: list[Captured]) -> None:
    def kept(model: nn.Module) -> Tensor:
        first = model(inputs(2))
        first.sum().backward(retain_graph=True)
        model(inputs(3)).sum().backward()
        first.square().sum().backward()
        return first

    pair = Pair()
    before = made[0].replays
    pair.both(kept)
    assert made[0].replays == before + 1


def test_a_graph_that_is_dropped_frees_the_recording(made: list[Captured]) -> None:
    pair = Pair()
    before = made[0].replays
    output = pair.fast(inputs())
    del output
    gc.collect()
    pair.fast(inputs())
    assert made[0].replays == before + 2


def test_gradients_of_inputs_and_of_gradients() -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = inputs().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        first.norm().backward()
        return [first.detach(), x.grad]

    Pair().both(penalty)


def test_gradients_accumulate() -> None:
    def accumulate(model: nn.Module) -> None:
        for seed in range(3):
            model(inputs(seed)).square().sum().backward()

    Pair().both(accumulate)


def test_evaluation_between_steps(made: list[Captured]) -> None:
    def evaluate(model: nn.Module) -> list[Tensor]:
        found = []
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found += [model(inputs(seed)).clone() for seed in range(4)]
        model(inputs()).sum().backward()
        return found

    Pair().both(evaluate)
    assert [graph.replays for graph in made] == [2, 2, 2]


def test_weights_changed_between_forward_and_backward() -> None:
    def change(model: nn.Module) -> None:
        output = model(inputs())
        with torch.no_grad():
            model.paths[0][2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        model.zero_grad()  # plain PyTorch has those of the layers behind it by then

    Pair(lambda: Deep(6)).both(change)


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
    pair = Pair(Counting)
    pair.both(lambda model: model(inputs()).square().sum().backward())
    assert made[0].replays == 2


def test_parameters_that_move(made: list[Captured]) -> None:
    pair = Pair()

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

    pair = Pair()
    pair.both(freeze)
    pair.both(freeze)


def test_settings_are_followed(made: list[Captured]) -> None:
    pair = Pair()
    before = made[0].replays
    with torch.backends.mkldnn.flags(enabled=False):
        pair.both(lambda model: model(inputs()).sum().backward())
        assert made[0].replays == before, "the first call under other settings runs as it is"
        pair.both(lambda model: model(inputs()).sum().backward())
        assert made[0].replays == before + 1


def test_what_cannot_be_recorded_runs_uncaptured(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        era, may_free = 0, True

        def make_room(self) -> None:
            raise torch.OutOfMemoryError("no memory for a recording")

    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda device: Full())
    pair = Pair()
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

    Pair(Writes).both(use)
    assert made == []
    assert any("writes its input" in text for graph in report.graphs for text in graph.refusals)


def test_verified_steps(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(config.current(), verify=3)
    monkeypatch.setattr(config, "current", lambda: settings)
    monkeypatch.setattr(verify, "_all", [])
    monkeypatch.setattr(verify, "_said", False)
    fast = on_captured(Three(8).double())
    for _ in range(5):
        fast(inputs()).square().sum().backward()
    verify.say_rest()
    assert "verified 3 steps of a network" in capfd.readouterr().err
    assert made[0].replays == 3


def test_a_wrong_replay_is_found(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(config.current(), verify=3)
    monkeypatch.setattr(config, "current", lambda: settings)
    monkeypatch.setattr(verify, "_all", [])
    monkeypatch.setattr(replay, "_copied", lambda output: output.detach() + 1e-3)
    fast = on_captured(Three(8).double())
    for _ in range(2):
        fast(inputs()).square().sum().backward()
    with pytest.raises(SystemExit) as ended:
        fast(inputs())
    assert ended.value.code == verify.EXIT_STATUS


def test_a_captured_plan_is_pinned(made: list[Captured], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    settings = dataclasses.replace(config.current(), save_plan=path)
    monkeypatch.setattr(config, "current", lambda: settings)
    monkeypatch.setattr(plans, "_saved", PlanFile())
    on_captured(fast := Three(8).double())
    for _ in range(2):
        fast(inputs()).sum().backward()
    plans._write(os.getpid())
    text = path.read_text()
    assert "captured\nregion 0: stream 1 | stream 2 | stream 3\n" in text
    settings = dataclasses.replace(config.current(), save_plan=None, plan=path, lanes="auto")
    for captures, replays in ((True, [2]), (False, [])):
        monkeypatch.setattr(Planner, "captures", captures)
        monkeypatch.setattr(Planner, "has_streams", True)
        plans.pins.cache_clear()
        torch._dynamo.reset()
        made.clear()
        other = Three(8).double()
        other.compile(backend=backend.mpsrun)
        for _ in range(4):
            other(inputs()).sum().backward()
        assert [graph.replays for graph in made] == replays
    plans.pins.cache_clear()
