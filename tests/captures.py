"""Networks on captured lanes, the recordings behind them, and what scripts do with them."""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SMALL, Three, why_not_here
from torch import Tensor, fx, nn
from transparency import TOLERANCE, assert_same, moved, trained

from mpsrun import config
from mpsrun.plan.planfile import PlanFile
from mpsrun.run import captured, plans, report
from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import Captured


def noted(patch: pytest.MonkeyPatch, thrift_after: int | None = None) -> list[Captured]:
    """All captured graphs that are made from now on, by networks that are compiled from now on.

    thrift_after: after how many steps that are alike they start with thrift, if not as usual.
    """
    torch._dynamo.reset()
    report.graphs.clear()
    if thrift_after is not None:
        patch.setattr(captured, "STEPS_BEFORE_THRIFT", thrift_after)
    found: list[Captured] = []
    make = Captured.__init__

    def note(self: Captured, *args: object) -> None:
        make(self, *args)
        found.append(self)

    patch.setattr(Captured, "__init__", note)
    return found


def graph_of(model: nn.Module, *given: Tensor) -> fx.GraphModule:
    """The graph that Dynamo finds."""
    graphs: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, _inputs: object) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=note)(*given)
    return graphs[0]


def on_captured(model: nn.Module) -> nn.Module:
    """Compile a module in place, captured lanes forced."""
    model.compile(backend=mpsrun, options={"lanes": "captured"})
    return model


def on_captured_workers(model: nn.Module, workers: int) -> nn.Module:
    """Compile a module in place, every legal region forced into workers, and captured there and in the lead."""
    model.compile(backend=mpsrun, options={"lanes": "captured-workers", "workers": workers})
    return model


class Overwriting:
    """As a GPU records: each replay has its results in the same tensors, and the next forward writes over gradients."""

    era, has_workers = 0, False

    def make_room(self) -> None:
        """There is no pool."""

    def follow(self) -> None:
        """There is one order only."""

    def record(self, function: Callable[[], Any], forward: "Overwritten | None" = None) -> "Overwritten":
        return Overwritten(function, forward)


class Failing(Overwriting):
    """Records no backward of a forward in `bad`; after that no recording so far is to be replayed, as on a GPU."""

    def __init__(self) -> None:
        self.bad: list[Overwritten] = []
        self.failures = 0
        self.next_is_bad: Callable[[], bool] = lambda: False
        self.says = "operation not permitted when stream is capturing"

    def record(self, function: Callable[[], Any], forward: "Overwritten | None" = None) -> "Overwritten":
        if any(forward is known for known in self.bad):
            self.era += 1
            self.failures += 1
            raise RuntimeError(self.says)
        made = super().record(function, forward)
        if forward is None and self.next_is_bad():
            self.bad.append(made)
        return made


class Overwritten:
    def __init__(self, function: Callable[[], Any], forward: "Overwritten | None") -> None:
        self._function, self._forward = function, forward
        self._large: list[Tensor] = []  # that a backward of this forward has left

    def replay(self) -> Any:
        if self._forward is None:
            for tensor in self._large:
                tensor.data.fill_(torch.nan)
            return self._function()
        found = self._function()
        own = [tensor for _, large in found.rows for tensor in large]
        if not self._forward._large:
            self._forward._large = own
        for kept, new in zip(self._forward._large, own, strict=True):
            kept.data.copy_(new)
        left = iter(self._forward._large)
        rows = tuple((small, [next(left) for _ in large]) for small, large in found.rows)
        return dataclasses.replace(found, rows=rows)


class Pair:
    """The same network plain and captured, the latter past its first calls."""

    def __init__(self, capture: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], calls: int) -> None:
        torch.manual_seed(0)
        self.plain = make().double()
        self.fast = capture(copy.deepcopy(self.plain))
        for _ in range(calls):
            self.both(step)

    def both(self, use: Callable[[nn.Module], Tensor | Sequence[Tensor | None] | None]) -> None:
        """Do the same with both and compare what it returns, all gradients and all buffers."""
        seen = []
        for model in (self.plain, self.fast):
            torch.manual_seed(1)
            result = use(model)
            results = [result] if isinstance(result, Tensor) else result or ()
            found = {f"result {i}": value for i, value in enumerate(results)}
            found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
            seen.append(found | model.state_dict())
        assert_same(seen[1], seen[0], "", TOLERANCE)


def three() -> nn.Module:
    return Three(8)


class Heads(nn.Module):
    """Two outputs, each with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = three(), three()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def inputs(seed: int = 1) -> Tensor:
    """A batch for these networks."""
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module) -> Tensor:
    """One forward and backward."""
    model.zero_grad()
    output = model(inputs())
    output.square().sum().backward()
    return output


def two_forwards(model: nn.Module) -> Tensor:
    """A backward through both of two calls."""
    first, second = model(inputs(2)), model(inputs(3))
    (first * second).sum().backward()
    return first


def kept_graph(model: nn.Module) -> Tensor:
    """A backward, a step, and another backward through the first graph."""
    first = model(inputs(2))
    first.sum().backward(retain_graph=True)
    model(inputs(3)).sum().backward()
    first.square().sum().backward()
    return first


def gradient_penalty(model: nn.Module) -> list[Tensor | None]:
    """A gradient of a gradient."""
    x = inputs().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.norm().backward()
    return [first.detach(), x.grad]


def kept_results(model: nn.Module) -> list[Tensor]:
    """Outputs and gradients of earlier steps."""
    found = []
    for seed in range(3):
        model.zero_grad()
        output = model(inputs(seed))
        output.sum().backward()
        found += [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return found


def evaluation(model: nn.Module) -> list[Tensor]:
    """Calls without gradients, then a step."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found += [model(inputs(seed)).clone() for seed in range(4)]
    return [*found, step(model)]


def assert_transparent(name: str, capture: Callable[[nn.Module], nn.Module], made: Sequence[Captured]) -> None:
    """Train one of the small networks plain and captured, and see the same; the last three of five steps replay."""
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().double())
    fast = trained(capture(copy.deepcopy(plain.model)))
    with torch._dynamo.config.patch(allow_rnn=True):
        for number in range(5):
            given = tuple(moved(x, "cpu", torch.float64) for x in case.inputs())
            assert_same(fast.step(given, number), plain.step(given, number), f"step {number}", TOLERANCE)
    assert [graph.replays for graph in made] == [3]


def assert_settings_are_followed(pair: Pair, made: Sequence[Captured]) -> None:
    """Under other global settings than before it is recorded again."""
    graph = made[0]
    before = graph.replays
    with torch.backends.mkldnn.flags(enabled=False):
        pair.both(step)
        assert graph.replays == before, "the first call under other settings runs as it is"
        pair.both(step)
        assert graph.replays == before + 1


def saved_plan(patch: pytest.MonkeyPatch, path: Path, capture: Callable[[nn.Module], nn.Module]) -> str:
    """What `--save-plan` writes about two steps of a captured network."""
    settings = dataclasses.replace(config.current(), save_plan=path)
    patch.setattr(config, "current", lambda: settings)
    patch.setattr(plans, "_saved", PlanFile())
    model = capture(three().double())
    for _ in range(2):
        step(model)
    plans._write(os.getpid())
    return path.read_text()


def train_pinned(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Four steps of the same network under `--plan`."""
    settings = dataclasses.replace(config.current(), save_plan=None, plan=path, lanes="auto")
    patch.setattr(config, "current", lambda: settings)
    plans.pins.cache_clear()
    torch._dynamo.reset()
    model = three().double()
    model.compile(backend=mpsrun)
    for _ in range(4):
        step(model)
    plans.pins.cache_clear()


def habits(model: nn.Module, batches: list[Tensor], turn: int, slopes: bool = False) -> list[Tensor]:
    """What a script may do with a network on a GPU, and all that comes of it; slopes: gradients of gradients, too."""
    model.zero_grad(set_to_none=bool(turn % 2))
    first, second, third = (batch.clone().requires_grad_() for batch in batches)
    a, b = model(first), model(second)
    (a * b).sum().backward()
    c = model(third)
    c.sum().backward(retain_graph=True)
    c.square().sum().backward()
    if slopes:
        (slope,) = torch.autograd.grad(model(third).square().sum(), third, create_graph=True)
        slope.square().sum().backward()
    with torch.no_grad():
        evaluated = model(first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(first).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    found = [a, b, c, evaluated, first.grad, second.grad, third.grad]
    found += [p.grad.clone() for p in model.parameters()] + [buffer.clone() for buffer in model.buffers()]
    if turn == 2:
        for p in model.parameters():
            p.data = p.data * 0.5
    return [tensor.detach() for tensor in found]
