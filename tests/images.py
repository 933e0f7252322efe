"""Networks of images with two branches, and what a script sees of them under plans with the channels last."""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import on_captured
from torch import Tensor, nn
from transparency import TOLERANCE, assert_same, trained

from mpsrun import config
from mpsrun.plan.candidates import with_gradients_beside
from mpsrun.run import special
from mpsrun.run.captured import Captured

Body = Callable[[Any, Tensor], Any]
SMALL = 0.01  # a loss by which a network hardly learns, so that rounding does not grow from step to step


def ask_for_channels_last(patch: pytest.MonkeyPatch) -> None:
    """Captured plans that are made from now on have them."""
    settings = dataclasses.replace(config.current(), channels_last="on")
    patch.setattr(config, "current", lambda: settings)


def ask_for_gradients_beside(patch: pytest.MonkeyPatch) -> None:
    """Captured plans that are made from now on compute those of weights beside the rest of backward."""
    plan = special.forced_captured
    patch.setattr(special, "forced_captured", lambda *args: with_gradients_beside(plan(*args)))


class Branch(nn.Module):
    """What `body` does with two convolutions."""

    def __init__(self, body: Body, kernel: int) -> None:
        super().__init__()
        self.body = body
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, kernel, padding=kernel // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Fork(nn.Module):
    """Two branches that are alike but for their weights, and what follows when they have met."""

    def __init__(self, body: Body, kernel: int = 3, end: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.end = end
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.left, self.right = Branch(body, kernel), Branch(body, kernel)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x)).relu()
        left, right = self.left(x), self.right(x)
        if isinstance(left, tuple):
            return tuple(torch.tanh(a + b) * SMALL for a, b in zip(left, right, strict=True))
        return self.end(torch.tanh(left * right)) * SMALL


def assert_same_as_plain(
    make: Callable[[], nn.Module],
    made: Sequence[Captured],
    steps: int = 4,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Outputs, gradients, statistics, random state and all strides; memory_format: of weights and inputs."""
    torch.manual_seed(0)
    plain = trained(make().to(device, torch.float64, memory_format=memory_format))  # type: ignore[call-overload]
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    for step in range(steps):
        given = (torch.randn(2, 3, 6, 6, dtype=torch.float64).to(device, memory_format=memory_format),)
        assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", TOLERANCE)
    assert [graph.replays for graph in made] == [steps - 2]


def without_gradients(function: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch.no_grad():
        return function(*args)


BODIES: dict[str, Body] = {
    "read before and after a write": lambda net, x: (
        (y := net.convolutions[0](x)).cumsum(1) * (y.relu_(), y.cumsum(1))[-1]
    ),
    "read without gradients first": lambda net, x: net.convolutions[0](x + without_gradients(net.convolutions[0], x)),
    "a sum of views": lambda net, x: sum(net.convolutions[0](x)[:, i : i + 1].cumsum(2) for i in range(4)),
    "one channel": lambda net, x: F.dropout(
        net.convolutions[1](net.convolutions[0](x)[:, :1].expand(-1, 4, -1, -1)), 0.0
    ),
    "convolutions": lambda net, x: net.convolutions[1](F.relu(net.convolutions[0](x))),
    "flat": lambda net, x: net.convolutions[0](x).flatten(1),
    "seen as rows": lambda net, x: net.convolutions[0](x).reshape(2, 2, -1).softmax(-1),
    "halves": lambda net, x: torch.cat(net.convolutions[0](x).chunk(2, 1)[::-1], 1),
    "half of the input": lambda net, x: F.conv2d(x[:, ::2], net.convolutions[0].weight[:, ::2], padding=1),
    "turned by itself": lambda net, x: net.convolutions[0](x).permute(0, 2, 3, 1).cumsum(-1),
    "gate": lambda net, x: x * net.convolutions[0](F.adaptive_avg_pool2d(net.convolutions[1](x), 1)).sigmoid(),
    "one pixel": lambda net, x: F.adaptive_avg_pool2d(net.convolutions[0](x), 1),
    "residual": lambda net, x: F.relu(net.convolutions[1](F.relu(net.convolutions[0](x), inplace=True)) + x),
    "added in place": lambda net, x: net.convolutions[0](x).add_(net.convolutions[1](x)).mul_(2).relu_(),
    "added to what is read": lambda net, x: (y := net.convolutions[0](x), y.add_(x), net.convolutions[1](y))[-1] + y,
    "pools": lambda net, x: F.avg_pool2d(F.max_pool2d(net.convolutions[0](x), 3, 1, 1), 2),
    "pools with places": lambda net, x: F.max_pool2d(net.convolutions[0](x), 2, return_indices=True)[0],
    "resized": lambda net, x: F.interpolate(net.convolutions[0](x), scale_factor=2.0, mode="nearest"),
    "joined with rows": lambda net, x: torch.cat([net.convolutions[0](x), x.flip(3)], 1),
    "weight used twice": lambda net, x: net.convolutions[0](net.convolutions[0](x)),
    "weight made": lambda net, x: F.conv2d(x, net.convolutions[0].weight.tanh() * 2, padding=1),
    "back up": lambda net, x: F.conv_transpose2d(net.convolutions[0](x), net.convolutions[1].weight, stride=2),
    "in groups": lambda net, x: F.conv2d(x, net.convolutions[0].weight[:, :1], groups=4, padding=1),
    "expanded": lambda net, x: net.convolutions[0](x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 5)),
    "two results": lambda net, x: (net.convolutions[0](x), net.convolutions[1](x).mean((2, 3))),
    "asks for strides": lambda net, x: (y := net.convolutions[0](x)) * sum(y.stride()),
    "asks for order": lambda net, x: (y := net.convolutions[0](x)) * (2 if y.is_contiguous() else 3),
    "as rows of memory": lambda net, x: net.convolutions[0](x).as_strided((2, 8), (40, 3)),
    "slope": lambda net, x: F.leaky_relu(F.silu(net.convolutions[0](x)), 0.2),
    "squares summed": lambda net, x: net.convolutions[0](x).square().mean((1, 2)),
}
OF_THREE = ("half of the input", "weight made", "in groups")  # they pad for a kernel of three


class Programme(nn.Module):
    """Ops drawn by chance, on two branches that meet."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = [random.Random(seed).choices(STEPS, k=6), random.Random(seed + 1000).choices(STEPS, k=6)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(4, 4, k, padding=k // 2, bias=False) for k in (1, 3, 3, 1, 3, 3) * 2
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(12))
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = []
        for branch, steps in enumerate(self.draw):
            y = x * (branch + 1)
            for i, step in enumerate(steps):
                y = step(self.convolutions[6 * branch + i], self.norms[6 * branch + i], y)
            branches.append(y)
        return torch.tanh(torch.cat(branches, 1).mean(1)) * SMALL


def halves_swapped(_conv: nn.Module, _norm: nn.Module, y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    return torch.cat([b, a], 1)


STEPS: list[Callable[[Any, Any, Tensor], Tensor]] = [
    lambda conv, _, y: conv(y),
    lambda conv, _, y: conv(y),
    lambda conv, norm, y: F.relu(norm(conv(y)), inplace=True),
    lambda conv, _, y: conv(y).add_(y),
    lambda conv, _, y: torch.cat([conv(y)[:, :2], y[:, :2]], 1),
    lambda _, norm, y: norm(y),
    lambda _, __, y: F.max_pool2d(y, 3, 1, 1),
    lambda _, __, y: F.dropout(y, 0.3),
    lambda _, __, y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    lambda _, __, y: y.flatten(2).cumsum(2).view_as(y),
    lambda _, __, y: y.transpose(2, 3),
    lambda _, __, y: y + y.flip(2),
    halves_swapped,
]
