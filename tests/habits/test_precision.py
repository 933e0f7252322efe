"""Mixed precision and global settings."""

import pytest
import torch
from alike import Seen, gradients, same, sum_of, x
from networks import Three
from torch import Tensor, nn
from transparency import on_lanes

from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.usefixtures("workers")


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str, nothing_kept: None) -> None:
    class Inside(Three):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    def script(model: nn.Module) -> Seen:
        model = model.float()
        losses = []
        for i in range(4):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
                output = model(x(i).float())
            assert output.dtype is torch.bfloat16
            sum_of(output.float()).backward()
            losses.append(output.detach().float())
        return {"outputs": torch.stack(losses), **gradients(model)}

    same(script, make=Three if where == "outside" else Inside, calls=4)


def test_global_flags_travel(nothing_kept: None) -> None:
    """Under deterministic algorithms fresh memory is filled with NaN: seen from the branches themselves."""

    class Fresh(Three):
        def forward(self, x: Tensor) -> Tensor:
            found = [path(x) + torch.empty(4, dtype=x.dtype).isnan().to(x.dtype) for path in self.paths]
            return self.head(torch.cat(found, 1))

    def script(model: nn.Module) -> Seen:
        torch.use_deterministic_algorithms(True)
        try:
            return {f"deterministic {i}": model(x()).detach() for i in range(3)}
        finally:
            torch.use_deterministic_algorithms(False)

    same(script, make=Fresh, calls=4)


def test_newer_precision_settings(workers: Coordinator) -> None:
    """torch refuses to read the older settings once the newer ones are in use: a step must not need them."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    fast = on_lanes(Three(), 2)
    try:
        settings.fp32_precision = "tf32"
        for _ in range(3):
            fast(torch.randn(5, 6)).sum().backward()
    finally:
        settings.fp32_precision = before
