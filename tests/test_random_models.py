"""Random networks as DAGs of ops train on lanes as they train plainly."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transparency import TOLERANCE, Trained, assert_same, on_lanes, trained

from mpsrun.run import report

WIDTH, ROWS, STEPS, EXAMPLES = 3, 4, 3, 40
KINDS = (
    "linear", "linear", "norm", "tanh", "mlp", "relu_", "relu_ of a copy", "scale_", "view", "weight", "split",
    "count", "shared", "add", "mul", "cat",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    kind: str
    sources: tuple[int, int]


class Network(nn.Module):
    """Runs `steps`; each takes earlier values, and what nobody takes is an output."""

    counter: Tensor

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in steps)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in steps)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1]
        used: set[int] = set()
        for index, step in enumerate(self.steps):
            values.append(self.step(index, step.kind, *(values[source] for source in step.sources)))
            used.update(step.sources[: 2 if step.kind in TWO else 1])
        return tuple(value for index, value in enumerate(values) if index not in used)

    def step(self, index: int, kind: str, first: Tensor, second: Tensor) -> Tensor:
        if kind in TWO:
            return TWO[kind](first, second)
        if kind in WRITING:
            return WRITING[kind](self, first)
        linear = self.linears[index]
        match kind:
            case "linear":
                return linear(first)
            case "norm":
                return self.norms[index](first)
            case "mlp":
                return F.gelu(self.norms[index](linear(first))).softmax(1)
            case "view":
                return first.view(-1).view(-1, WIDTH)
            case "weight":
                return first @ linear.weight.exp()
            case "split":
                left, right = linear(first).split([1, WIDTH - 1], 1)
                return torch.cat([right, left], 1)
            case "shared":
                return self.shared(first)
        return first.tanh()

    def count(self, x: Tensor) -> Tensor:
        self.counter.add_(1)
        return x * self.counter.to(x.dtype).reciprocal()


TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda first, second: first + second,
    "mul": lambda first, second: first * second.sigmoid(),
    "cat": lambda first, second: torch.cat([first, second], 1).view(2, -1, WIDTH).sum(0),
}
WRITING: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "relu_": lambda _, x: torch.relu_(x),
    "relu_ of a copy": lambda _, x: torch.relu_(x.clone()),
    "scale_": lambda _, x: x.mul_(0.5),
    "count": lambda network, x: network.count(x),
}


@st.composite
def networks(draw: st.DrawFn) -> Network:
    steps = []
    for index in range(draw(st.integers(4, 12))):
        # From a few trunks in the middle, or from what is new: chains beside each other.
        source = st.integers(0, index) | st.integers(max(0, index - 3), index)
        steps.append(Step(draw(st.sampled_from(KINDS)), (draw(source), draw(st.integers(0, index)))))
    torch.manual_seed(draw(st.integers(0, 100)))
    return Network(steps)


forks = 0


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # every example compiles a network: shrinking would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(networks(), st.sampled_from([1, 2, 4]))
def check_network(network: Network, workers: int) -> None:
    global forks
    torch._dynamo.reset()
    report.graphs.clear()
    plain = trained(network.double())
    fast = trained(on_lanes(copy.deepcopy(network), workers))
    for step in range(STEPS):
        if not same_step(plain, fast, step):
            return
    forks += any(graph.calls for graph in report.graphs)


def same_step(plain: Trained, fast: Trained, step: int) -> bool:
    """Whether the networks can be trained: an in-place op may have overwritten what backward needs."""
    inputs = (torch.randn(ROWS, WIDTH, dtype=torch.float64),)
    try:
        wanted = plain.step(inputs, step)
    except RuntimeError:
        return False
    assert_same(fast.step(inputs, step), wanted, f"step {step} of {plain.model.steps}", TOLERANCE)
    return True


@pytest.mark.usefixtures("workers")
def test_random_networks() -> None:
    global forks
    forks = 0
    check_network()
    assert forks >= EXAMPLES / 2, "too few examples fork"
