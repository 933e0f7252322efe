"""Counters of recorded forwards, moved on by one op at the end of each."""

from typing import Any

import pytest
import torch
from captures import graph_of, noted, on_captured
from images import BODIES, Fork, assert_same_as_plain
from torch import Tensor, nn

from mpsrun.graph.counters import lone_counters
from mpsrun.graph.effects import analyze
from mpsrun.run import counting
from mpsrun.run.captured import Captured
from mpsrun.run.counting import count, gathered


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test."""
    return noted(monkeypatch)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many counters were moved on in one op, by op."""
    found: list[int] = []
    add = torch._foreach_add_

    def note(some: list[Tensor], other: Any) -> None:
        found.extend([] if some[0].is_floating_point() else [len(some)])  # gradients are added up so, too
        add(some, other)

    monkeypatch.setattr(counting.torch, "_foreach_add_", note)
    return found


class Norms(nn.Module):
    """Two branches with two counters each."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 6))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], 1)


def test_batches_are_counted_in_one_op(made: list[Captured], sizes: list[int]) -> None:
    """In replays; other calls count where plain PyTorch does."""
    model = on_captured(Norms())
    versions = []
    for step in range(5):
        model(torch.randn(4, 6)).sum().backward()
        counted = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
        assert [int(b) for b in counted] == [step + 1] * 4
        versions.append({b._version for b in counted})
    assert [graph.replays for graph in made] == [3]
    assert sizes == [4] * 3
    assert all(len(seen) == 1 for seen in versions)
    assert [min(seen) - min(versions[0]) for seen in versions] == [0, 1, 2, 3, 4]


def test_nobody_can_tell(made: list[Captured], sizes: list[int]) -> None:
    assert_same_as_plain(lambda: Fork(BODIES["residual"]), made)
    assert sizes == [1, 1]


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    counter = torch.zeros((), dtype=torch.long)

    def fail() -> None:
        with gathered():
            count(counter, 1)
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="middle"):
        fail()
    assert counter == 0
    count(counter, 3)
    assert counter == 3


class Counts(nn.Module):
    """Counters that are moved on in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("one", torch.zeros((), dtype=torch.long))
        self.register_buffer("two", torch.zeros(3, dtype=torch.long))
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("first", self.two[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "alone":
            self.one.add_(1)
        if self.way == "read":
            return x * self.one.add_(1)
        if self.way == "read later":
            self.one.add_(1)
            return x * self.one
        if self.way == "by a tensor":
            self.one.add_(x.new_ones((), dtype=torch.long))
        if self.way == "twice":
            self.one.add_(1)
            self.one.add_(1)
        if self.way == "several":
            self.two.add_(1)
        if self.way == "a view of what is read":
            self.first.add_(1)
            return x * self.two.sum()
        if self.way == "real":
            self.real.add_(1)
        return x + 1


@pytest.mark.parametrize(
    "way", ["alone", "read", "read later", "by a tensor", "twice", "several", "real", "a view of what is read"]
)
def test_only_counters_that_nobody_reads(way: str) -> None:
    gm = graph_of(Counts(way), torch.randn(3))
    assert len(lone_counters(gm, analyze(gm))) == (way == "alone")


def test_an_input_is_no_counter() -> None:
    class Given(nn.Module):
        def forward(self, counter: Tensor, x: Tensor) -> Tensor:
            counter.add_(1)
            return x + 1

    gm = graph_of(Given(), torch.zeros((), dtype=torch.long), torch.randn(3))
    assert not lone_counters(gm, analyze(gm))
