"""Captured plans whose convolutions have the channels last, recorded on a GPU."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import noted
from images import BODIES, Fork, Programme, ask_for_channels_last, assert_same_as_plain
from torch import Tensor, nn

from mpsrun import config
from mpsrun.run import lower, report
from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import Captured

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, which start with thrift after four steps that are alike."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ask_for_channels_last(monkeypatch)
    return noted(monkeypatch, thrift_after=4)


@pytest.mark.parametrize("name", BODIES)
def test_nobody_can_tell(daemon: None, sides: None, name: str, made: list[Captured]) -> None:
    assert_same_as_plain(lambda: Fork(BODIES[name]), made, steps=8, device="cuda")


@pytest.mark.parametrize("drop", [F.dropout, F.dropout2d])
def test_random_masks_are_those_of_plain_pytorch(
    daemon: None, sides: None, drop: Callable[[Tensor], Tensor], made: list[Captured]
) -> None:
    """Before a fork, on a branch, and after the join."""
    body = lambda net, x: net.convolutions[1](drop(net.convolutions[0](drop(x))))  # noqa: E731
    assert_same_as_plain(lambda: Fork(body, end=drop), made, steps=8, device="cuda")


@pytest.mark.parametrize("seed", range(8))
def test_programmes_drawn_by_chance(daemon: None, sides: None, seed: int, made: list[Captured]) -> None:
    assert_same_as_plain(lambda: Programme(seed), made, steps=8, device="cuda")


class Wide(nn.Module):
    """Branches that tensor cores gain on."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1, bias=False) for _ in range(6))) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


@pytest.mark.parametrize("timed", [False, True])
def test_a_network_that_gains_by_it(daemon: None, timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the plans that are tried, and whichever is chosen agrees with plain PyTorch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no plan is known
    settings = dataclasses.replace(config.current(), channels_last="auto")
    monkeypatch.setattr(config, "current", lambda: settings)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", timed)
    turned: list[torch.memory_format] = []
    turn = lower.in_format
    monkeypatch.setattr(lower, "in_format", lambda value, wanted: (turned.append(wanted), turn(value, wanted))[1])
    torch.manual_seed(0)
    plain = Wide().cuda()
    fast = Wide().cuda()
    fast.load_state_dict(plain.state_dict())
    fast.compile(backend=mpsrun, options={"lanes": "auto"})
    x = torch.randn(16, 128, 28, 28, device="cuda")
    for _ in range(80):
        fast.zero_grad()
        loss = fast(x).square().mean()
        loss.backward()
    wanted = plain(x).square().mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=0)
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.stride() == other.grad.stride()
        assert (one.grad - other.grad).norm() < 1e-2 * other.grad.norm()
    (chosen,) = report.graphs[-1].chosen.values()
    assert "captured" in chosen
    assert turned, "it was not tried"
