"""Habits in any order on a random forking network: after each, everything is as it is on the plain one."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import alike
import pytest
import torch
from alike import executed
from captures import Overwriting, noted
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor
from transparency import TOLERANCE, assert_same

from benchmarks.habits import HABITS, Forking, Habit, Trainee, one_backward_for_several, steps
from mpsrun.run import captured, keeping
from mpsrun.run.in_place import compile_in_place

EXAMPLES, RULES = 10, 12
CAPTURED = 4  # examples; in scripts/test --slow ten times as many

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")


def seen(t: Trainee) -> dict[str, Tensor | None]:
    values: dict[str, Tensor | None] = {n: v.clone() for n, v in t.model.state_dict().items()}
    return {**values, **{f"gradient of {n}": p.grad for n, p in t.model.named_parameters()}}


def in_any_order(t: Trainee, seed: int) -> list[Tensor]:
    """Two forwards, and then the backwards, of the first one or of the second one first, or of both twice."""
    t.optimizer.zero_grad()
    first, second = t.loss(seed), t.loss(seed + 1)
    if seed % 3 == 2:
        (first * second).backward(retain_graph=True)
        (first + second).backward()
    else:
        for loss in (first, second) if seed % 3 else (second, first):
            loss.backward()
    t.optimizer.step()
    return [first.detach(), second.detach()]


class Script(RuleBasedStateMachine):
    """A script of which two copies run, one plain and one on lanes."""

    options: ClassVar[Mapping[str, Any] | None] = None
    more: ClassVar[tuple[Habit, ...]] = ()

    @initialize(branches=st.integers(2, 4), seed=st.integers(0, 100))
    def begin(self, branches: int, seed: int) -> None:
        torch._dynamo.reset()
        torch.manual_seed(seed)
        plain = Forking(branches).to(alike.where, torch.float64)
        self.plain, self.fast = Trainee(plain), Trainee(copy.deepcopy(plain))
        compile_in_place(self.fast.model, self.options)

    @rule(number=st.integers(0, 100), seed=st.integers(0, 1000))
    def go_on(self, number: int, seed: int) -> None:
        habits = (*HABITS, *self.more)
        habit = habits[number % len(habits)]
        found = []
        for t in (self.plain, self.fast):
            torch.manual_seed(seed)
            values = habit(t, seed)
            found.append({**{f"{i}": value for i, value in enumerate(values)}, **seen(t)})
        assert_same(found[1], found[0], habit.__name__, TOLERANCE)


class CapturedScript(Script):
    """On captured lanes, with many calls that overlap."""

    options: ClassVar[Mapping[str, Any] | None] = {"lanes": "captured"}
    more: ClassVar[tuple[Habit, ...]] = (in_any_order, steps, one_backward_for_several) * 3


def run(script: type[Script], examples: int) -> None:
    run_state_machine_as_test(
        script,
        settings=settings(
            max_examples=examples,
            stateful_step_count=RULES,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # every example compiles networks: shrinking would take minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("examples", [CAPTURED, pytest.param(10 * CAPTURED, marks=pytest.mark.slow)])
def test_any_order_of_habits_when_captured(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """On recordings that overwrite memory as those of a GPU do, which come to thrift and to lending soon."""
    made = noted(monkeypatch, thrift_after=2)
    monkeypatch.setattr(captured, "MOST_RECORDINGS", 40)
    monkeypatch.setattr(keeping, "STEPS_BEFORE_LENDING", 1)
    monkeypatch.setattr(keeping, "LARGE_BYTES", 0)
    monkeypatch.setattr("mpsrun.run.variant.recorder", lambda _device: Overwriting())
    run(CapturedScript, examples)
    assert sum(graph.replays for graph in made) >= 2 * examples, "too few calls are replayed"
    assert examples == CAPTURED or any(graph.thrift.frees for graph in made)


def test_any_order_of_habits() -> None:
    before = executed()
    run(Script, EXAMPLES)
    assert executed() - before >= 10 * EXAMPLES, "too few examples used the lanes"
