"""Networks are found in the ways in which frameworks call them, and the search ends with the training step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import Three
from torch import Tensor, nn

from mpsrun.run import in_place, report
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.discover import Discovery


@pytest.fixture
def discovery(workers: Coordinator) -> Iterator[Discovery]:
    """A search, as the launcher starts it."""
    report.graphs.clear()
    found = Discovery()
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in in_place.CHANGED}):
        found.install()
        yield found
        found.remove()


class Training(nn.Module):
    """Calls its network from a step of its own, as Lightning's modules do: it is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Three().double()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


def batch() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


def searching() -> bool:
    return nn.Module._compiled_call_impl is not None  # type: ignore[attr-defined]


def on_lanes() -> int:
    return sum(graph.calls for graph in report.graphs)


def test_network_called_by_a_closure_of_the_optimizer(discovery: Discovery) -> None:
    """The closure runs the training step within `optimizer.step`, once or often: that is one step."""
    model = Training()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.training_step(batch())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert searching()
    optimizer.step(closure)
    assert not searching()
    assert model.net._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    before = on_lanes()
    optimizer.step(closure)
    assert on_lanes() > before


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another one, as accelerate's: it never sets itself up."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_wrapped_optimizer_counts_once(discovery: Discovery) -> None:
    model = Three().double()
    optimizer = Wrapped(torch.optim.SGD(model.parameters(), lr=0.01))
    for searched in (True, False):
        model(batch()).sum().backward()
        optimizer.step()
        assert searching() == searched


def test_network_whose_forward_is_replaced(discovery: Discovery) -> None:
    """As accelerate does for autocast: the new one is an attribute of the module itself."""
    model = Three().double()
    plain = model.forward

    def forward(*args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return plain(*args) * 2

    model.forward = forward  # type: ignore[method-assign]
    wanted = 2 * plain(x := batch())
    for _ in range(4):
        torch.testing.assert_close(model(x), wanted)
    assert on_lanes() == 2


def test_evaluation_before_training(discovery: Discovery) -> None:
    """Lightning checks the validation loop first: what runs there without gradients decides nothing."""
    model = Training()
    model.eval()
    with torch.inference_mode():
        for _ in range(3):
            model.net(batch())
    model.train()
    before = on_lanes()
    for _ in range(3):
        model.training_step(batch()).backward()
    assert on_lanes() - before == 2


def test_evaluation_that_stays_in_the_lead_decides_nothing(discovery: Discovery) -> None:
    """What tuning finds for evaluation must not cost training its lanes."""
    network = Three().double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            network(x)
        for graph in report.graphs:
            graph.plain = True
        network(x)
    network.train()
    for _ in range(3):
        network(x).sum().backward()
    assert any(graph.calls and not graph.plain for graph in report.graphs)


class Chain(nn.Module):
    """Nothing of it can use a lane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3))).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_network_that_runs_plain_is_one_all_the_same(discovery: Discovery, capfd: pytest.CaptureFixture[str]) -> None:
    """What it calls is not looked at in its place, as in steps that accumulate gradients before the second update."""
    models = [Chain(), Chain()]
    for _ in range(8):
        for model in models:
            model(batch()).sum().backward()
    assert searching()
    said = capfd.readouterr().err.splitlines()
    assert said == ["mpsrun: Chain runs plain: nothing of it can use a lane (--verbose says why)"] * 2
    assert not report.graphs or all(graph.plain for graph in report.graphs)
    models[0].layers(batch()).sum().backward()  # called by the script itself, this is one
    models[0].layers(batch()).sum().backward()
    assert "Sequential runs plain" in capfd.readouterr().err


def test_what_a_resting_network_calls_is_no_network(discovery: Discovery, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Three().double()
    for _ in range(3):
        model(batch()).sum().backward()
    monkeypatch.setattr(in_place, "looked_through", lambda: True)
    model(batch()).sum().backward()
    assert "_compiled_call_impl" in vars(model)
    assert not any("_compiled_call_impl" in vars(inner) for inner in model.children())


def test_where_nothing_can_be_gained_the_first_network_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    """None is compiled, and no call is looked at any more."""
    Discovery("no GPU").install()
    wanted, model = nn.Linear(6, 1).double(), Three().double()
    assert searching()
    for network in (model, wanted):
        network(batch())
    assert not searching()
    assert "_compiled_call_impl" not in vars(model)
    assert capfd.readouterr().err == "mpsrun: no GPU: Three runs plain; --lanes workers tries lanes on the CPU\n"
