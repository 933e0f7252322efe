"""Captured lanes with thrift: a backward that frees what it reads, and gradients that are lent, where scripts let them.

A CPU's recordings call the function anew: what is freed is seen here, memory that is overwritten in tests/gpu.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import (
    Heads,
    Overwriting,
    Pair,
    gradient_penalty,
    inputs,
    kept_graph,
    noted,
    on_captured,
    step,
    three,
    two_forwards,
)
from torch import Tensor, nn

from mpsrun.run import captured, keeping, replay, subject
from mpsrun.run.captured import Captured
from mpsrun.run.recorder import Recording, Repeater
from mpsrun.run.replay import Thrift

NONE, ALL = Thrift(False, False), Thrift(True, True)
Use = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, which start with thrift after three steps that are alike."""
    return noted(monkeypatch, thrift_after=3)


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[Thrift]:
    """The thrift of each forward that is recorded."""
    found: list[Thrift] = []

    class Noted(replay.Body):
        def __init__(self, *args: Any) -> None:
            found.append(args[-1])
            super().__init__(*args)

    monkeypatch.setattr(captured, "Body", Noted)
    return found


class Counting(nn.Module):
    """Reads a buffer that each call changes, and has a bias that backward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = three(), nn.Linear(2, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.head(torch.tanh(self.body(x)) * self.steps)


def thrifty(bodies: list[Thrift], make: Callable[[], nn.Module] = three) -> Pair:
    """A pair that has come to thrift."""
    pair = Pair(on_captured, make, calls=6)
    assert bodies == [NONE, ALL]
    return pair


def twice(model: nn.Module) -> Tensor:
    output = model(inputs(2))
    output.sum().backward(retain_graph=True)
    output.square().sum().backward()
    return output


def test_it_starts_once_steps_were_alike(bodies: list[Thrift], made: list[Captured]) -> None:
    pair = Pair(on_captured, three, calls=5)
    assert bodies == [NONE]
    pair.both(step)
    assert bodies == [NONE, ALL]
    for _ in range(12):
        pair.both(step)
    assert bodies == [NONE, ALL]
    assert made[0].replays == 16


def test_what_autograd_does_is_found_out_once(
    bodies: list[Thrift], made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each recording: it takes half a second for a large network. Other flags or arguments are another case."""
    seen: list[Any] = []
    follow = subject.follow_gradients

    def noted_follow(function: Any, inputs: Any, state: Any) -> Any:
        seen.append(inputs)
        return follow(function, inputs, state)

    monkeypatch.setattr(subject, "follow_gradients", noted_follow)
    pair = Pair(on_captured, three, calls=8)
    assert bodies == [NONE, ALL]
    assert len(seen) == 1
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    for _ in range(3):
        pair.both(step)
    assert len(bodies) == 3
    assert len(seen) == 2


@pytest.mark.parametrize("habit", [twice, gradient_penalty])
def test_habits_from_the_first_step_on_keep_it_away(bodies: list[Thrift], habit: Use) -> None:
    pair = Pair(on_captured, three, calls=0)
    for _ in range(12):
        pair.both(habit)
    assert bodies == [NONE]


@pytest.mark.parametrize(("use", "thrift"), [(two_forwards, [ALL, ALL]), (kept_graph, [ALL])])
def test_it_starts_for_each_of_two_calls(bodies: list[Thrift], use: Use, thrift: list[Thrift]) -> None:
    pair = Pair(on_captured, three, calls=0)
    for _ in range(12):
        pair.both(use)
    assert bodies == [NONE, NONE, *thrift]


def test_a_second_call_has_to_show_that_it_may(bodies: list[Thrift]) -> None:
    pair = thrifty(bodies)
    for _ in range(3):
        pair.both(two_forwards)
    assert bodies == [NONE, ALL, NONE]
    for _ in range(3):
        pair.both(two_forwards)
    assert bodies == [NONE, ALL, NONE, ALL]


@pytest.mark.parametrize("make", [three, Counting], ids=["three", "counting"])
def test_a_kept_graph_ends_it(bodies: list[Thrift], made: list[Captured], make: Callable[[], nn.Module]) -> None:
    """The step in which that happens is computed anew, from what was there before it."""
    pair = thrifty(bodies, make)
    before = made[0].replays
    for _ in range(6):
        pair.both(twice)
    for _ in range(6):
        pair.both(step)
    assert bodies == [NONE, ALL, NONE]
    assert made[0].replays == before + 12


@pytest.mark.parametrize("make", [three, Counting], ids=["three", "counting"])
def test_gradients_of_gradients_do_not(bodies: list[Thrift], make: Callable[[], nn.Module]) -> None:

    def weight_penalty(model: nn.Module) -> Tensor:
        model.zero_grad()
        output = model(inputs(2))
        gradients = torch.autograd.grad(output.square().mean(), [*model.parameters()], create_graph=True)
        sum(gradient.square().mean() for gradient in gradients).backward()  # type: ignore[union-attr]
        return output

    pair = thrifty(bodies, make)
    for _ in range(3):
        pair.both(weight_penalty)
    assert bodies == [NONE, ALL]


def test_outputs_whose_gradients_come_in_turn(bodies: list[Thrift], made: list[Captured]) -> None:
    def in_turn(model: nn.Module, seed: int) -> None:
        model.zero_grad()
        left, right = model(inputs(seed))
        left.sum().backward()
        right.square().sum().backward()

    def together(model: nn.Module, seed: int) -> None:
        model.zero_grad()
        left, right = model(inputs(seed))
        (left.sum() + right.square().sum()).backward()

    pair = Pair(on_captured, Heads, calls=0)
    for seed in range(6):
        pair.both(functools.partial(in_turn, seed=seed))
    assert bodies == [NONE]
    for seed in range(6):
        pair.both(functools.partial(together, seed=seed))
    assert bodies == [NONE, ALL]
    for seed in range(3):
        pair.both(functools.partial(in_turn, seed=seed))
    assert bodies == [NONE, ALL, NONE]
    assert made[0].replays == 13


def test_what_forward_has_read_and_is_gone(bodies: list[Thrift]) -> None:
    """A wrong gradient would be worse than none."""

    def with_a_step_between(model: nn.Module) -> None:
        output = model(inputs(2))
        output.sum().backward(retain_graph=True)
        with torch.no_grad():
            model.head.bias.add_(1)  # type: ignore[union-attr, operator]
        output.square().sum().backward()

    model = on_captured(Counting().double())
    for _ in range(6):
        step(model)
    assert bodies == [NONE, ALL]
    with pytest.raises(RuntimeError, match=r"compute forward anew for this backward, but head\.bias was changed since"):
        with_a_step_between(model)
    with_a_step_between(model)
    assert bodies == [NONE, ALL, NONE]


def test_a_backward_that_cannot_free_goes_back_to_one_that_keeps(
    bodies: list[Thrift], made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Repeater.record
    fails = [False, False, False, True]  # forward and backward, without thrift and then with it

    def recorded(self: Repeater, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        if fails and fails.pop(0):
            raise torch.OutOfMemoryError("no memory for a recording")
        return record(self, function, forward)

    monkeypatch.setattr(Repeater, "record", recorded)
    pair = Pair(on_captured, Counting, calls=12)
    assert bodies == [NONE, ALL, NONE]
    assert made[0].replays == 10
    pair.both(twice)


def test_a_forward_that_cannot_be_recorded_anew(
    bodies: list[Thrift], made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step runs as it is, then as before."""
    record = Repeater.record
    fails = [False, False, True]

    def recorded(self: Repeater, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        if fails and fails.pop(0):
            raise torch.OutOfMemoryError("no memory for a recording")
        return record(self, function, forward)

    monkeypatch.setattr(Repeater, "record", recorded)
    Pair(on_captured, three, calls=12)
    assert bodies == [NONE, ALL, NONE]
    assert made[0].replays == 9


def test_a_backward_that_is_recorded_in_no_way(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that finds out is computed op by op, on what its forward has left."""
    record = Repeater.record

    def recorded(self: Repeater, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        if forward is not None:
            raise torch.OutOfMemoryError("no memory for a recording")
        return record(self, function, forward)

    monkeypatch.setattr(Repeater, "record", recorded)
    Pair(on_captured, Counting, calls=6)
    assert made[0].replays == 1


class Shifted(Counting):
    """Reads that buffer only in forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.head(self.body(x)) + self.steps


def stepped_twice(model: nn.Module) -> Tensor:
    first, second = model(inputs(2)), model(inputs(3))
    loss = (first * second).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return first


def penalised(model: nn.Module) -> Tensor:
    x = inputs(2).requires_grad_()
    first, second = model(x), model(inputs(3))
    (slope,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    (slope.square().sum() + second.sum()).backward()
    return first


@pytest.mark.parametrize("use", [stepped_twice, penalised])
def test_a_second_call_that_changes_what_the_first_one_has_read(bodies: list[Thrift], use: Use) -> None:
    """Each recording keeps what its forward has found in a buffer; to compute the forward anew it takes that."""

    pair = Pair(on_captured, Shifted, calls=0)
    for _ in range(10):
        pair.both(two_forwards)
    assert ALL in bodies
    for _ in range(3):
        pair.both(use)


def test_a_second_recording_that_fails_does_not_harm_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU older recordings are not to be replayed after that."""

    pair = Pair(on_captured, Shifted, calls=4)
    record = Repeater.record

    def failing(self: Repeater, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        if forward is None:
            monkeypatch.setattr(Repeater, "era", Repeater.era + 1)
            raise torch.OutOfMemoryError("in a capture")
        return record(self, function, forward)

    monkeypatch.setattr(Repeater, "record", failing)
    pair.both(two_forwards)


def drops(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int) -> object:
    optimizer.zero_grad()
    loss().backward()
    return None


def drops_after_forward(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int
) -> object:
    found = loss()
    optimizer.zero_grad()
    found.backward()
    return None


def keeps_some(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int) -> object:
    drops(model, optimizer, loss, number)
    return [p.grad for p in model.parameters()] if number in (16, 30) else None


def keeps_views(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int) -> object:
    drops(model, optimizer, loss, number)
    return [p.grad.view(-1)[:1] for p in model.parameters() if p.grad is not None] if number in (16, 30) else None


def accumulates(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int) -> object:
    if number < 16 or not number % 4:
        optimizer.zero_grad()
    loss().backward()
    return None


def asks_for_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int
) -> object:
    optimizer.zero_grad()
    gradients = torch.autograd.grad(loss(), [*model.parameters()])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    return None


def overlaps(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], number: int) -> object:
    optimizer.zero_grad()
    (loss() * loss()).backward()
    return None


HABITS = [drops, drops_after_forward, keeps_some, keeps_views, accumulates, asks_for_gradients, overlaps]


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_gradients_where_they_were_recorded(monkeypatch: pytest.MonkeyPatch, habit: Callable[..., Any]) -> None:
    """Handed out without a copy, they are the script's all the same."""
    monkeypatch.setattr(keeping, "LARGE_BYTES", 0)
    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda _device: Overwriting())
    lent: list[int] = []
    hand_out = keeping._Row.hand_out
    monkeypatch.setattr(keeping._Row, "hand_out", lambda *args: (lent.append(args[3]), hand_out(*args))[1])
    torch.manual_seed(0)
    plain = three().double()
    fast = on_captured(copy.deepcopy(plain))
    seen = []
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        kept, found = [], []
        for number in range(40):
            more = habit(model, optimizer, lambda: model(inputs(number)).square().mean(), number)  # noqa: B023
            kept += more or []
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
        seen.append(found + kept + [p.detach() for p in model.parameters()])
    for got, wanted in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    assert any(lent) == (habit is not drops_after_forward)


@pytest.mark.parametrize("habit", ["keeps", "accumulates"])
def test_large_gradients_are_copied_once_one_was_kept(
    bodies: list[Thrift], monkeypatch: pytest.MonkeyPatch, habit: str
) -> None:
    monkeypatch.setattr(keeping, "LARGE_BYTES", 0)
    pair = thrifty(bodies)
    kept: list[Tensor] = []

    def one(model: nn.Module, keeps: bool) -> list[Tensor]:
        if not (keeps and habit == "accumulates"):
            model.zero_grad()
        model(inputs(2)).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        kept.extend(grads if keeps and habit == "keeps" else ())
        return [grad.clone() for grad in grads]

    for _ in range(keeping.STEPS_BEFORE_LENDING + 3):
        pair.both(lambda model: one(model, False))
    assert bodies == [NONE, ALL]
    for _ in range(6):
        pair.both(lambda model: one(model, True))
    assert bodies == [NONE, ALL, Thrift(True, False)]


def test_a_loss_that_is_kept_does_not_keep_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two recordings would be in memory while the second one is made."""
    fast = on_captured(copy.deepcopy(three().double()))
    losses = []
    for _ in range(8):
        losses.append(fast(inputs()).sum())
        losses[-1].backward()
    holders = [call for call in map(_call_behind, losses) if call is not None]
    assert holders
    assert all(call.body is None for call in holders)


def _call_behind(loss: Tensor) -> Any:
    """The call of a recording that a loss comes from; None where it came from none."""
    found = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return getattr(found, "call", None)
