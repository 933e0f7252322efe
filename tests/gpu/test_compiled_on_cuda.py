"""Branches that workers compile with Inductor on a GPU: the same training up to rounding, captured or not."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from captures import on_captured_workers
from networks import Inception, Three, images
from torch import Tensor, nn
from transparency import assert_executed, assert_same, moved, on_lanes, trained

from mpsrun import config
from mpsrun.run import report
from mpsrun.run.coordinator import Coordinator
from mpsrun.wire import messages as m

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def prepared(on_gpu: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[m.Prepared]]:
    """--compile-branches; what the workers say once they have prepared something."""
    settings = dataclasses.replace(on_gpu.settings, compile_branches=True)
    monkeypatch.setattr(config, "current", lambda: settings)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    report.graphs.clear()
    found: list[m.Prepared] = []
    hear = on_gpu._watcher._hear

    def note(message: m.ToLead) -> None:
        if isinstance(message, m.Prepared):
            found.append(message)
        hear(message)

    monkeypatch.setattr(on_gpu._watcher, "_hear", note)
    yield found
    torch._dynamo.reset()


class Dropping(Three):
    """Two of its branches draw random numbers: one at least is a worker's."""

    def __init__(self) -> None:
        super().__init__(32)
        for i in range(2):
            self.paths[i] = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("make", "lanes", "given"),
    [
        (Inception, on_lanes, images),
        (Three, on_captured_workers, lambda: (torch.randn(5, 6),)),
        (Dropping, on_lanes, lambda: (torch.randn(5, 6),)),
    ],
)
def test_training(
    on_gpu: Coordinator,
    prepared: list[m.Prepared],
    make: Callable[[], nn.Module],
    lanes: Callable[[nn.Module, int], nn.Module],
    given: Callable[[], tuple[Tensor, ...]],
) -> None:
    torch.manual_seed(0)
    plain = trained(make().to("cuda", torch.float64))
    fast = trained(lanes(copy.deepcopy(plain.model), 3))
    for step in range(6):
        inputs = tuple(moved(x, "cuda", torch.float64) for x in given())
        assert_same(fast.step(inputs, step), plain.step(inputs, step), f"step {step}", EXACT)
    (graph,) = report.graphs
    assert_executed(graph, 5, 5)
    assert prepared, "workers take part"
    assert {message.uncompiled for message in prepared} == {None}
    is_random = any("draws random numbers" in reason for reason in map(str, graph.refusals))
    assert is_random == (make is Dropping)
    if make is Inception:
        with torch.no_grad():
            (x,) = inputs
            for _ in range(2):
                torch.testing.assert_close(fast.model(x), plain.model(x), **EXACT)
