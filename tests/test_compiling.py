"""Branches that workers compile with Inductor: the same training up to rounding; the plain branch where that fails."""

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pool
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import on_captured_workers
from networks import Inception, Three, images
from test_choosing import both, train, until_decided
from torch import Tensor, nn
from transparency import TOLERANCE, assert_executed, assert_same, on_lanes, trained
from tuned import Timed, auto_lanes

from mpsrun import config
from mpsrun.graph.program import State
from mpsrun.run import compiling, report
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.link import Link
from mpsrun.wire import messages as m

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler on a CPU, and finds none"
)


@pytest.fixture
def compiles(workers: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[m.Prepared]]:
    """--compile-branches; what the workers say once they have prepared something."""
    settings = dataclasses.replace(workers.settings, compile_branches=True)
    monkeypatch.setattr(config, "current", lambda: settings)
    report.graphs.clear()
    yield noted(workers, monkeypatch)
    torch._dynamo.reset()


def noted(coordinator: Coordinator, patch: pytest.MonkeyPatch) -> list[m.Prepared]:
    found: list[m.Prepared] = []
    hear = coordinator._watcher._hear

    def note(message: m.ToLead) -> None:
        if isinstance(message, m.Prepared):
            found.append(message)
        hear(message)

    patch.setattr(coordinator._watcher, "_hear", note)
    return found


def block(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """Two outputs, statistics that are written, a number among the inputs."""
    y = F.batch_norm(F.conv2d(x, weight, padding=pads), mean, var, training=True)
    return torch.relu(y), y.mean(1).sin()


class Calls:
    """`block`, and how often it ran as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.count += 1
        return block(*args)


def block_inputs(dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(1)
    x, weight = torch.randn(2, 3, 6, 6, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype)
    statistics = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    return [x.requires_grad_(), weight.requires_grad_(), *statistics, 1]


def used(function: Any, values: list[Any]) -> dict[str, Tensor]:
    """Everything that a call shows, whatever its strides: a worker copies it into the slot. Backward comes twice."""
    first, second = function(*values)
    seen = {"first": first, "second": second, "mean": values[2], "var": values[3]}
    if first.requires_grad:
        for round_ in range(2):
            given = [torch.ones_like(first), torch.ones_like(second).cos()]
            gradients = torch.autograd.grad([first, second], values[:2], given, retain_graph=not round_)
            seen |= {f"gradient {i}, {round_}": gradient for i, gradient in enumerate(gradients)}
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in seen.items()}


@needs_compiler
def test_a_function_is_as_it_was_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._functorch.config as aot

    monkeypatch.setattr(aot, "donated_buffer", aot.donated_buffer)  # which is set for good
    plain = Calls()
    with compiling.settings():
        function = compiling.compiled(plain, block_inputs(), 2, "cpu")
        traced = plain.count
        assert_same(used(function, block_inputs()), used(block, block_inputs()), "compiled", TOLERANCE)
    assert plain.count == traced
    assert_same(used(function, block_inputs()), used(block, block_inputs()), "later", TOLERANCE)
    assert plain.count == traced
    with torch.no_grad():
        assert_same(used(function, block_inputs()), used(block, block_inputs()), "without gradients", TOLERANCE)
    assert plain.count == traced + 1, "other modes than it was compiled for"
    turned = block_inputs()
    turned[0] = turned[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    assert_same(used(function, turned), used(block, block_inputs()), "other strides", TOLERANCE)
    assert plain.count == traced + 2


@needs_compiler
@pytest.mark.parametrize("make", [on_lanes, pytest.param(on_captured_workers, marks=pytest.mark.slow)])
def test_training(compiles: list[m.Prepared], make: Any) -> None:
    """Gradients, statistics, a call without gradients in between, and gradients of gradients."""
    torch.manual_seed(0)
    plain = trained(Three().double())
    fast = trained(make(copy.deepcopy(plain.model), 2))
    train((plain, fast), 4)
    (graph,) = report.graphs
    assert {message.uncompiled for message in compiles} == {None}
    assert {message.worker for message in compiles} == {*graph.regions[0].lanes} - {0}
    assert_executed(graph, 3, 3)
    x = torch.randn(5, 6, dtype=torch.float64)
    for model in (plain.model, fast.model):
        (first,) = torch.autograd.grad(model(x).square().sum(), model.trunk.weight, create_graph=True)  # type: ignore[union-attr,arg-type]
        first.square().sum().backward()
    for wanted, found in zip(plain.model.parameters(), fast.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, **TOLERANCE)


@needs_compiler
@pytest.mark.slow
def test_evaluation_and_other_sizes(compiles: list[m.Prepared]) -> None:
    torch.manual_seed(0)
    plain = trained(Inception().double())
    fast = trained(on_lanes(copy.deepcopy(plain.model), 2))
    for size in (6, 8, 6, 8):
        (x,) = images(size=size)
        x = x.double()
        assert_same(fast.step((x,), 0), plain.step((x,), 0), f"size {size}", TOLERANCE)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(fast.model(x), plain.model(x), **TOLERANCE)
    assert {message.uncompiled for message in compiles} == {None}


@needs_compiler
@pytest.mark.slow
def test_it_is_one_of_the_plans_that_are_tried(
    workers: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with auto_lanes(workers, monkeypatch, tmp_path):
        settings = dataclasses.replace(config.current(), compile_branches=True)
        monkeypatch.setattr(config, "current", lambda: settings)
        clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes, compiled": 500.0})
        prepared = noted(workers, monkeypatch)
        sides = both()
        plan, _ = until_decided(sides)
        assert plan.startswith("branches compiled\nregion 0: ")
        assert {"serial", "workers, 3 lanes", "workers, 3 lanes, compiled"} <= {*clock.names}
        assert {message.uncompiled for message in prepared} == {None}
        train(sides, 2)


def test_where_it_cannot_be_the_branch_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And one line says why, whatever the number of branches and workers."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pool.running(dataclasses.replace(pool.SHARED, workers=2, compile_branches=True)) as coordinator:
        prepared = noted(coordinator, monkeypatch)
        report.graphs.clear()
        plain = trained(Three().double())
        fast = trained(on_lanes(copy.deepcopy(plain.model), 2))
        train((plain, fast), 3)
        assert_executed(report.graphs[0], 2, 2)
        torch._dynamo.reset()
    assert len({message.worker for message in prepared if message.uncompiled}) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be compiled" in line]
    assert len(said) == len({message.uncompiled for message in prepared}) == 1, said


def test_not_where_the_same_bits_are_asked_for(compiles: list[m.Prepared]) -> None:
    torch.use_deterministic_algorithms(mode=True)
    try:
        model = on_lanes(Three().double(), 2)
        for _ in range(2):
            model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(mode=False)
    (graph,) = report.graphs
    assert any("not compiled" in reason for reason in map(str, graph.refusals))
    assert graph.calls == 1


def test_a_plan_is_for_what_was_asked(compiles: list[m.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that an earlier run chose without compiled branches says nothing about them."""
    from torch import fx

    from mpsrun.run import plans

    gm = fx.symbolic_trace(nn.ReLU())
    asked = plans.key_of(gm, [torch.ones(2)], "cpu", 1)
    monkeypatch.setattr(config, "current", config.Config)
    usual = plans.key_of(gm, [torch.ones(2)], "cpu", 1)
    assert asked.digest() != usual.digest()
    assert plans.fingerprint(asked) == plans.fingerprint(usual)


class Nowhere:
    def send(self, worker: int, message: m.ToWorker) -> None:
        """Told to nobody."""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_worker_compiles_until_it_answers(compiled: bool) -> None:
    """Also what is not needed any more, since nothing stops it."""
    link = Link(1, Nowhere(), 2, 3)  # type: ignore[arg-type]
    link.has_started()
    link.send(m.Prepare(7, 0, 8, False, State(), [], {}, [], [], [], [], compiled=compiled))
    link.forget([7], [8], [])
    assert (link.compiles, bool(link.preparing)) == (compiled, compiled)
    link.has_prepared(7)
    assert not link.compiles
    assert not link.preparing


@pytest.mark.parametrize("error", [RuntimeError("\n  first\nsecond"), KeyError("x" * 1000)])
def test_a_reason_is_one_short_line(error: Exception) -> None:
    text = compiling.reason(error)
    assert text.startswith(f"{type(error).__name__}: ")
    assert "second" not in text
    assert len(text) <= compiling.MOST_CHARACTERS
