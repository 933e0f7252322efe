"""Networks on captured lanes, and the recordings behind them."""

import pytest
import torch
from torch import Tensor, nn

from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import Captured


def noted(patch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs that are made from now on."""
    found: list[Captured] = []
    make = Captured.__init__

    def note(self: Captured, *args: object) -> None:
        make(self, *args)
        found.append(self)

    patch.setattr(Captured, "__init__", note)
    return found


def on_captured(model: nn.Module) -> nn.Module:
    """Compile a module in place, captured lanes forced."""
    model.compile(backend=mpsrun, options={"lanes": "captured"})
    return model


def on_captured_workers(model: nn.Module, workers: int) -> nn.Module:
    """Compile a module in place, every legal region forced into workers, and captured there and in the lead."""
    model.compile(backend=mpsrun, options={"lanes": "captured-workers", "workers": workers})
    return model


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
