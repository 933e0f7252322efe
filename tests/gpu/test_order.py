"""The GPU itself keeps the order between processes: a planted delay on any edge changes no number."""

import copy
import time
from typing import Any

import pytest
import torch
from networks import Three
from torch import Tensor, nn
from transparency import on_lanes

from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.gpu
DELAY_CYCLES = 100_000_000  # about 60 ms at 1.7 GHz
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}


class Delayed:
    """Trains a network plainly and on lanes, with a delay planted at one place of the latter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.plain: nn.Module = Three().double().cuda()
        self.fast = on_lanes(copy.deepcopy(self.plain), 2)
        for _ in range(2):
            self.step("nowhere")

    def step(self, where: str) -> None:
        wanted, found = self._step(self.plain, "nowhere"), self._step(self.fast, where)
        torch.testing.assert_close(found, wanted, **TOLERANCE)

    def _step(self, model: nn.Module, where: str) -> dict[str, Any]:
        torch.manual_seed(1)
        source = torch.randn(5, 6, dtype=torch.float64, device="cuda")
        x = torch.full_like(source, 1e3)
        _sleep(where == "before publish")
        x.copy_(source)
        x.requires_grad_()
        model.zero_grad()
        output = model(x)
        _sleep(where == "after join")
        output.register_hook(lambda gradient: _late(gradient) if where == "backward" else gradient)
        output.square().sum().backward()
        _sleep(where == "before the optimizer")
        seen = {"output": output.detach(), "gradient": x.grad}
        seen |= {n: p.grad for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.01)  # type: ignore[arg-type]
        x.data.fill_(1e3)  # a reader that comes too late would see it
        return seen | {n: value.clone() for n, value in model.state_dict().items()}


def _sleep(here: bool) -> None:
    if here:
        torch.cuda._sleep(DELAY_CYCLES)


def _late(gradient: Tensor) -> Tensor:
    """The gradient, in memory that is filled after a delay."""
    held = torch.full_like(gradient, 1e3)
    torch.cuda._sleep(DELAY_CYCLES)
    return held.copy_(gradient)


@pytest.mark.parametrize("where", ["before publish", "after join", "backward", "before the optimizer"])
def test_delay_in_the_lead(on_gpu: Coordinator, where: str) -> None:
    pair = Delayed()
    for _ in range(4):
        pair.step(where)


def test_delay_on_another_stream(on_gpu: Coordinator) -> None:
    pair = Delayed()
    stream = torch.cuda.Stream()
    for where in ("before publish", "backward", "after join"):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pair.step(where)
        torch.cuda.current_stream().wait_stream(stream)
        pair.step(where)


def test_the_lead_does_not_wait(on_gpu: Coordinator) -> None:
    """Forward and backward are queued while the GPU is still busy with what came before."""
    pair = Delayed()
    x = torch.randn(5, 6, dtype=torch.float64, device="cuda")
    pair.fast(x).sum().backward()
    torch.cuda.synchronize()
    start = time.monotonic()
    torch.cuda._sleep(10 * DELAY_CYCLES)
    for _ in range(3):
        pair.fast(x).sum().backward()
    queued_s = time.monotonic() - start
    torch.cuda.synchronize()
    assert queued_s < 0.5 * (time.monotonic() - start)


def test_several_forwards_under_a_delay(on_gpu: Coordinator) -> None:
    pair = Delayed()
    inputs = [torch.randn(5, 6, dtype=torch.float64, device="cuda") for _ in range(6)]
    seen = []
    for model in (pair.plain, pair.fast):
        model.zero_grad()
        torch.cuda._sleep(DELAY_CYCLES)
        outputs = [model(x) for x in inputs]
        torch.cuda._sleep(DELAY_CYCLES)
        torch.stack(outputs[::-1]).square().sum().backward()
        seen.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(seen[1], seen[0], **TOLERANCE)
