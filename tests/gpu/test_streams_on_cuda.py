"""Side streams on a GPU: same results as plain PyTorch, whatever is slow and whatever memory is used again."""

import copy
import warnings
from typing import Any

import pytest
import torch
from networks import SMALL, Three, why_not_here
from torch import Tensor, nn
from transparency import assert_same, trained

from mpsrun.run import report
from mpsrun.run.backend import mpsrun

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    report.graphs.clear()


def on_streams(model: nn.Module) -> nn.Module:
    model.compile(backend=mpsrun, options={"lanes": "streams"})
    return model


def moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to("cuda", torch.float64) if value.is_floating_point() else value.to("cuda")


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks(daemon: None, sides: None, name: str) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on_streams(copy.deepcopy(plain.model)))
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(4):
            inputs = tuple(moved(x) for x in case.inputs())
            assert_same(fast.step(inputs, step), plain.step(inputs, step), f"step {step}", EXACT)
    (graph,) = report.graphs
    assert graph.calls == 3
    assert any(lane < 0 for region in graph.regions for lane in region.lanes)


def test_memory_that_is_used_again(daemon: None, sides: None) -> None:
    """Evaluation frees every intermediate at once, and other sizes take its memory."""
    torch.manual_seed(0)
    plain = Three(512).to("cuda", torch.float64)
    fast = on_streams(copy.deepcopy(plain))
    for step in range(30):
        x = torch.randn(64 + step % 3, 6, dtype=torch.float64, device="cuda")
        with torch.set_grad_enabled(step % 4 == 0):
            found, wanted = fast(x), plain(x)
        noise = [torch.full((256, 512), torch.nan, device="cuda") for _ in range(4)]  # takes what was given back
        torch.testing.assert_close(found, wanted, **EXACT)
        if step % 4 == 0:
            for model, output in ((fast, found), (plain, wanted)):
                model.zero_grad()
                output.square().sum().backward()
            for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, **EXACT)
        del noise


def test_an_error_leaves_the_main_stream(daemon: None) -> None:
    fast = on_streams(Three(64).to("cuda"))
    x = torch.randn(5, 6, device="cuda")
    before = torch.cuda.current_stream()
    for _ in range(3):
        fast(x).sum().backward()
    with pytest.raises(RuntimeError):
        fast(torch.randn(5, 7, device="cuda"))
    assert torch.cuda.current_stream() == before


def test_a_loss_that_is_kept_warns_of_nothing(daemon: None) -> None:
    """Its graph keeps the nodes that accumulated gradients on the main stream; now side streams make them."""
    plain = Three(64).to("cuda")
    fast = on_streams(copy.deepcopy(plain))
    x = torch.randn(5, 6, device="cuda")
    kept = [fast(x).sum()]  # the first call is plain
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                kept.append(fast(x).sum())
                kept[-1].backward()
    finally:
        torch.set_warn_always(always)
    assert not [warning for warning in told if "AccumulateGrad" in str(warning.message)]


class Siamese(nn.Module):
    """One encoder for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.encoder(x) * self.encoder(y)).sum(1)


@pytest.mark.parametrize("lanes", ["streams", "captured"])
def test_casts_of_autocast(daemon: None, sides: None, lanes: str) -> None:
    """A cast that a late side stream makes must not be read by another one."""
    torch.manual_seed(0)
    plain = Siamese().cuda()
    fast = copy.deepcopy(plain)
    fast.compile(backend=mpsrun, options={"lanes": lanes})
    for step in range(6):
        x, y = torch.randn(2, 64, 512, device="cuda")
        noise = [torch.full((512, 512), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        del noise  # what casts will be written to
        outputs = []
        for model in (fast, plain):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                outputs.append(model(x, y))
            outputs[-1].float().square().mean().backward()
        torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2, msg=lambda text, at=step: f"step {at}: {text}")
        for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2)
    (graph,) = report.graphs
    assert any(lane < 0 for region in graph.regions for lane in region.lanes)
