"""Mixed precision and global settings."""

import pytest
import torch
from alike import Seen, gradients, same, state, sum_of, x
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_mixed_precision(dtype: torch.dtype, nothing_kept: None) -> None:
    """Autocast, a scaler, clipping of unscaled gradients; the first scale overflows, and its step is left out."""

    def script(model: nn.Module) -> Seen:
        model = model.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        kind = x().device.type
        scaler = torch.amp.GradScaler(kind, init_scale=2.0**16, growth_interval=3, enabled=dtype is torch.float16)
        seen: Seen = {}
        for i in range(8):
            optimizer.zero_grad()
            with torch.autocast(kind, dtype):
                loss = model(x(i).float()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            seen |= {f"loss {i}": loss.detach(), f"finite {i}": bool(norm.isfinite()), f"scale {i}": scaler.get_scale()}
        finite = [seen[f"finite {i}"] for i in range(8)]
        assert all(finite) or (dtype is torch.float16 and not finite[0] and any(finite))
        return {**seen, **state(model)}

    same(script, calls=14)


def test_other_precision_in_the_middle(nothing_kept: None) -> None:
    """Parameters are replaced by those of another precision, and back."""

    def script(model: nn.Module) -> Seen:
        seen: Seen = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
            model.to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            for i in range(3):
                optimizer.zero_grad()
                output = model(x(i).to(dtype))
                sum_of(output).backward()
                optimizer.step()
                seen[f"{dtype} {i}"] = output.detach()
        return {**seen, **state(model)}

    same(script, calls=16)
