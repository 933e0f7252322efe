"""Gradients of convolutions' weights beside the rest of backward, recorded on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import noted, on_captured
from images import BODIES, Fork, Programme, ask_for_channels_last, ask_for_gradients_beside, assert_same_as_plain
from torch import Tensor, nn

from mpsrun.run import beside
from mpsrun.run.beside import Beside
from mpsrun.run.captured import Captured

pytestmark = pytest.mark.gpu
LONG = 20_000_000  # cycles of the GPU: some 10 ms


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, which start with thrift after four steps that are alike."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ask_for_gradients_beside(monkeypatch)
    return noted(monkeypatch, thrift_after=4)


@pytest.fixture(params=["as it is", "slow", "one waits"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gradients that come late would show who does not wait for them, or takes what they still read."""
    count: list[int] = []
    run = Beside.run

    def late(self: Beside, function: Callable[[], Any], reads: Sequence[Tensor]) -> Any:
        def delayed() -> Any:
            count.append(1)
            if request.param != "as it is":
                torch.cuda._sleep(LONG)
            return function()

        return run(self, delayed, reads)

    monkeypatch.setattr(Beside, "run", late)
    if request.param == "one waits":
        monkeypatch.setattr(beside, "MOST_WAITING", 1)
    return count


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["convolutions", "residual", "added in place", "pools", "in groups", "flat", "gate"])
def test_nobody_can_tell(
    daemon: None, slow: list[int], name: str, last: bool, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    if last:
        ask_for_channels_last(monkeypatch)
    assert_same_as_plain(lambda: Fork(BODIES[name]), made, steps=8, device="cuda")
    assert slow, "none was computed beside"


@pytest.mark.parametrize("seed", range(4))
def test_programmes_drawn_by_chance(
    daemon: None, sides: None, slow: list[int], seed: int, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_channels_last(monkeypatch)
    assert_same_as_plain(lambda: Programme(seed), made, steps=8, device="cuda")


def test_two_hundred_steps(daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and statistics of each of them, with the channels last, too."""
    ask_for_channels_last(monkeypatch)
    assert_same_as_plain(lambda: Fork(BODIES["pools"]), made, steps=200, device="cuda")


class Deep(nn.Module):
    """Two chains of convolutions, longer than a lane goes on without waiting, and one of single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.chains = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, groups=groups) for _ in range(12))) for groups in (1, 1, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return torch.stack([chain(x) for chain in self.chains]).sum(0)


@pytest.mark.parametrize("cast", [False, True])
def test_the_same_bits(daemon: None, slow: list[int], cast: bool) -> None:
    """The kernels are those of torch, under autocast as well."""
    torch.manual_seed(0)
    plain, fast = Deep().cuda(), Deep().cuda()
    fast.load_state_dict(plain.state_dict())
    on_captured(fast)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    for _ in range(8):
        for model in (plain, fast):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=cast):
                output = model(x)
            output.float().square().mean().backward()
        for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert len(slow) >= 36
