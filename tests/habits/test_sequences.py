"""Habits in any order on a random forking network: after each, everything is as it is on the plain one."""

import copy

import alike
import pytest
import torch
from alike import executed
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor
from transparency import TOLERANCE, assert_same

from benchmarks.habits import HABITS, Forking, Habit, Trainee
from mpsrun.run.in_place import compile_in_place

EXAMPLES, RULES = 10, 12

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")


def seen(t: Trainee) -> dict[str, Tensor | None]:
    values: dict[str, Tensor | None] = {n: v.clone() for n, v in t.model.state_dict().items()}
    return {**values, **{f"gradient of {n}": p.grad for n, p in t.model.named_parameters()}}


class Script(RuleBasedStateMachine):
    """A script of which two copies run, one plain and one on lanes."""

    @initialize(branches=st.integers(2, 4), seed=st.integers(0, 100))
    def begin(self, branches: int, seed: int) -> None:
        torch._dynamo.reset()
        torch.manual_seed(seed)
        plain = Forking(branches).to(alike.where, torch.float64)
        self.plain, self.fast = Trainee(plain), Trainee(copy.deepcopy(plain))
        compile_in_place(self.fast.model)

    @rule(habit=st.sampled_from(HABITS), seed=st.integers(0, 1000))
    def go_on(self, habit: Habit, seed: int) -> None:
        found = []
        for t in (self.plain, self.fast):
            torch.manual_seed(seed)
            values = habit(t, seed)
            found.append({**{f"{i}": value for i, value in enumerate(values)}, **seen(t)})
        assert_same(found[1], found[0], habit.__name__, TOLERANCE)


def test_any_order_of_habits() -> None:
    before = executed()
    run_state_machine_as_test(
        Script,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=RULES,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # every example compiles networks: shrinking would take minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert executed() - before >= 10 * EXAMPLES, "too few examples used the lanes"
