"""Counters of a graph, moved on by one op before the others."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from mpsrun.graph.counters import gather_counters
from mpsrun.graph.effects import analyze


def gathered(model: nn.Module, *given: Tensor, calls: int = 2) -> fx.GraphModule:
    """The graph of a network whose counters were gathered, after some calls of it."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _inputs: object) -> object:
        gather_counters(gm)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for _ in range(calls):
        compiled(*given)
    return graphs[0]


def targets(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.target in ("add_", torch._foreach_add_)]


def test_batches_are_counted_in_one_op() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    gm = gathered(model, x)
    for _ in range(2):
        plain(x)
    assert targets(gm) == [torch._foreach_add_]
    assert next(node.target for node in gm.graph.nodes if node.op != "placeholder") is torch._foreach_add_
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    versions = [[buffer._version for buffer in each.buffers()] for each in (model, plain)]
    assert versions[0] == versions[1]
    effects = analyze(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch._foreach_add_)
    assert len(effects.facts[node].writes) == 2


class Counts(nn.Module):
    """Counters that are not merely moved on by one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("one", torch.zeros((), dtype=torch.long))
        self.register_buffer("two", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "read":
            return x * self.one.add_(1) * self.two.add_(1)
        if self.way == "read later":
            self.one.add_(1)
            self.two.add_(1)
            return x * self.one * self.two
        if self.way == "other steps":
            self.one.add_(1)
            self.two.add_(2)
        if self.way == "by a tensor":
            self.one.add_(x.numel() * x.new_ones((), dtype=torch.long))
            self.two.add_(x.new_ones((), dtype=torch.long))
        if self.way == "twice":
            self.one.add_(1)
            self.one.add_(1)
        return x + 1


@pytest.mark.parametrize("way", ["read", "read later", "other steps", "by a tensor", "twice"])
def test_others_stay_where_they_are(way: str) -> None:
    model, plain, x = Counts(way), Counts(way), torch.randn(3)
    before = targets(gathered(model, x))
    assert torch._foreach_add_ not in before
    for _ in range(2):
        wanted = plain(x)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert wanted.shape == x.shape


def test_an_input_is_no_counter() -> None:
    def count(one: Tensor, two: Tensor) -> None:
        one.add_(1)
        two.add_(1)

    class Given(nn.Module):
        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            count(one, two)
            return one.new_zeros(2)

    gm = gathered(Given(), torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long), calls=1)
    assert torch._foreach_add_ not in targets(gm)
