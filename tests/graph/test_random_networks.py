"""Random networks as DAGs of ops: what is called a region is one."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nets import Captured, capture
from torch import Tensor, fx, nn

from mpsrun.graph.order import Order
from mpsrun.graph.program import Program, build, extract, validate
from mpsrun.graph.regions import Region

SIZE = 3
KINDS = ("linear", "norm", "relu_", "tanh", "view", "weight", "add", "cat", "scale_")


@dataclass(frozen=True)
class Step:
    kind: str
    sources: tuple[int, ...]


class Network(nn.Module):
    """Runs `steps`; each takes earlier values, and what nobody takes is an output."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = list(steps)
        linears = [nn.Linear(SIZE, SIZE) for _ in steps]
        self.linears = nn.ModuleList(linears)
        self.weights = [linear.weight for linear in linears]
        self.norms = nn.ModuleList(nn.BatchNorm1d(SIZE) for _ in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1]
        used: set[int] = set()
        for index, step in enumerate(self.steps):
            values.append(self.step(index, step.kind, [values[source] for source in step.sources]))
            used.update(step.sources)
        return tuple(value for index, value in enumerate(values) if index not in used)

    def step(self, index: int, kind: str, given: list[Tensor]) -> Tensor:
        first, last = given[0], given[-1]
        if kind == "linear":
            return self.linears[index](first)
        if kind == "norm":
            return self.norms[index](first)
        if kind == "relu_":
            return torch.relu_(first.clone()) if index % 2 else torch.relu_(first)
        if kind == "scale_":
            return first.mul_(0.5)
        if kind == "view":
            return first.view(-1).view(-1, SIZE)
        if kind == "weight":
            return first @ self.weights[index].exp()
        if kind == "add":
            return first + last
        if kind == "cat":
            return torch.cat([first, last], 1).view(2, -1, SIZE).sum(0)
        return first.tanh()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    steps = []
    for index in range(draw(st.integers(4, 14))):
        # Mostly near values: long chains beside each other.
        source = st.integers(max(0, index - 3), index)
        steps.append(Step(draw(st.sampled_from(KINDS)), (draw(source), draw(st.integers(0, index)))))
    return Network(steps)


def check_independent(region: Region, captured: Captured) -> None:
    effects = captured.effects
    order = Order(list(effects.order), effects.deps)
    masks = [order.mask(branch.nodes) for branch in region.branches]
    for first, second in itertools.permutations(masks, 2):
        assert not first & second
        assert not order.below_all(first) & second
    for mask in [*masks, sum(masks)]:
        assert not order.detours(mask), "convex"


def run_with_branches(captured: Captured, region: Region, inputs: Sequence[Any], seed: int) -> Any:
    """The graph, with the region's branches run as programs in a shuffled order at its fork."""
    effects = captured.effects
    values = dict(zip(captured.gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    inside = {node for branch in region.branches for node in branch.nodes}
    order = Order(list(effects.order), effects.deps)
    waiting = order.above_all(order.mask(inside))
    nodes = [node for node in captured.gm.graph.nodes if node not in inside and node.op.startswith("call_")]
    before = [node for node in nodes if order.bit[node] & waiting]
    after = [node for node in nodes if not order.bit[node] & waiting]
    interpret(before, values)
    branches = list(region.branches)
    random.Random(seed).shuffle(branches)
    for branch in branches:
        if branch.pinned is not None:
            interpret(branch.nodes, values)
            continue
        program, sources = extract(branch.nodes, effects, branch.outputs)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(program), type=Program)
        validate(decoded)
        values.update(zip(branch.outputs, build(decoded)(*(values[source] for source in sources)), strict=True))
    interpret(after, values)
    (output,) = captured.gm.graph.find_nodes(op="output")
    return fx.node.map_arg(output.args[0], values.__getitem__)


def interpret(nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        call = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
        values[node] = call(*(args if node.op == "call_function" else args[1:]), **kwargs)  # type: ignore[operator]


forked = 0


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # every example compiles a network: shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(networks(), st.integers(0, 5))
def check_network(network: Network, seed: int) -> None:
    global forked
    torch.manual_seed(0)
    x = torch.randn(4, SIZE)
    with torch.no_grad():
        captured = capture(network, x)
        regions = captured.found.regions
        forked += bool(regions)
        state = {name: value.clone() for name, value in network.state_dict().items()}
        wanted = network(x)
        statistics = {name: value.clone() for name, value in network.state_dict().items()}
        for region in regions:
            check_independent(region, captured)
            network.load_state_dict(state)
            found = run_with_branches(captured, region, captured.inputs, seed)
            torch.testing.assert_close(tuple(found), tuple(wanted), rtol=0, atol=0)
            torch.testing.assert_close(dict(network.state_dict()), statistics, rtol=0, atol=0)


def test_regions_of_random_networks() -> None:
    global forked
    forked = 0
    check_network()
    assert forked >= 10, "too few examples fork"
