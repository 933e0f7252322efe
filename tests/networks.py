"""Small networks with branches, and what is expected to be found in each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and the branches of each of its regions.

    used: how many workers a region can keep busy, where branches have to stay in the lead. forward_only: the regions
    whose workers have nothing to do in backward.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    regions: tuple[int, ...]
    used: int | None = None
    forward_only: tuple[int, ...] = ()


def images(count: int = 4, channels: int = 3, size: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(count, channels, size, size),)


def rows(count: int = 5, width: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(count, width),)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class ConvNormRelu(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, size: int = 1, inplace: bool = True) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=inplace),
        )


class Inception(nn.Module):
    """Four branches of `width` channels each."""

    def __init__(self, inputs: int = 3, width: int = 2) -> None:
        super().__init__()
        self.one = ConvNormRelu(inputs, width)
        self.three = nn.Sequential(ConvNormRelu(inputs, width), ConvNormRelu(width, width, 3))
        self.five = nn.Sequential(ConvNormRelu(inputs, width), ConvNormRelu(width, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNormRelu(inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """Stem, nine inception blocks, classifier."""

    def __init__(self, blocks: int = 9, width: int = 2) -> None:
        super().__init__()
        channels = 4 * width
        self.stem = ConvNormRelu(3, channels, 3)
        self.blocks = nn.Sequential(*(Inception(channels, width) for _ in range(blocks)))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class PathNet(nn.Module):
    """Layers of parallel modules whose outputs are summed."""

    def __init__(self, layers: int = 2, paths: int = 3, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(mlp(width, 8, width) for _ in range(paths)) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for paths in self.layers:
            total = paths[0](x)
            for path in list(paths)[1:]:
                total = total + path(x)
            x = torch.relu(total)
        return self.head(x)


class Towers(nn.Module):
    """Two inputs, a tower for each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(6, 8, 4), mlp(5, 7, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.left(x) * self.right(y))


class Heads(nn.Module):
    """A trunk and three heads that end in different outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(6, 8, 6)
        self.heads = nn.ModuleDict({name: mlp(6, 5, 2 + i) for i, name in enumerate("abc")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.trunk(x))
        return {name: head(x) for name, head in self.heads.items()}


class InPlace(nn.Module):
    """In-place ops on what a branch made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        left = torch.relu_(self.left(x).mul_(2))
        right = F.leaky_relu_(self.right(x).add_(1), 0.1)
        return left - right


class NestedForks(nn.Module):
    """Two branches, each of which forks again."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.inner = nn.ModuleList(mlp(6, 8, 6) for _ in range(4))
        self.last = nn.ModuleList(nn.Linear(12, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for i in range(2):
            y = torch.tanh(self.outer[i](x))
            y = torch.cat([self.inner[2 * i](y), self.inner[2 * i + 1](y)], 1)
            found.append(self.last[i](y))
        return torch.cat(found, 1)


class Norms(nn.Module):
    """Batch norms with running averages and without, and one whose output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.middle = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=0.3, affine=False), nn.Tanh())
        self.right = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh())
        self.idle = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        self.idle(left)
        return torch.stack([left, self.middle(x), self.right(x)]).prod(0)


class Dropouts(nn.Module):
    """Random numbers in every branch, drawn in the order of the plain network."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(mlp(6, 8, 4), nn.Dropout(0.4)) for _ in range(2))
        self.quiet = nn.ModuleList(mlp(6, 8, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in (*self.paths, *self.quiet)], 1)


class SharedParameter(nn.Module):
    """One layer used by two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.left, self.right, self.third = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(torch.tanh(self.shared(x)))
        right = self.right(torch.sigmoid(self.shared(x)))
        return torch.cat([left, right, self.third(x).tanh()], 1)


class TiedWeight(nn.Module):
    """Two names for one parameter, and a plain transpose of it in the other branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x).tanh(), F.linear(x, self.right.weight.t(), self.right.bias).tanh()], 1)


class SeveralTensors(nn.Module):
    """A branch that hands out two tensors, one of them an index; beside it one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = mlp(6, 8, 4), mlp(6, 8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left = self.left(x)
        values, indices = left.sort(1)
        right = torch.softmax(self.right(x), 1)
        gathered = right.gather(1, indices)
        return self.both(values * gathered), indices, left.detach().exp()


class ViewsOut(nn.Module):
    """Branches that hand out views: transposed, sliced, split, and one of the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.third = mlp(6, 8, 6), mlp(6, 8, 6), mlp(6, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).t()
        right = self.right(x)[:, 1:5]
        first, second = self.third(x).chunk(2, 1)
        return left.t()[:, :4] * right + torch.cat([first, second[:, :1]], 1) * x[:, :4]


class OutputToo(nn.Module):
    """A branch's output is used by the join and is an output of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(6, 8, 4), mlp(6, 8, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = self.left(x).tanh(), self.right(x).tanh()
        return self.head(torch.cat([left, right], 1)), left, right


class ResidualChain(nn.Module):
    """Nothing to run side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(6, 8, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


class ProjectedResiduals(nn.Module):
    """Residual blocks with a projection on the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(6, 8, 6) for _ in range(3))
        self.shortcuts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = torch.relu(shortcut(x) + block(x))
        return x


class Embeddings(nn.Module):
    """Integer inputs: an embedding and an embedding bag, one of them with its gradient scaled by frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(11, 6, padding_idx=0), nn.EmbeddingBag(13, 6, mode="mean")
        self.left, self.right = mlp(6, 8, 4), mlp(6, 8, 4)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        left = self.left(self.users(users).sum(1))
        right = self.right(self.items(items))
        return (left * right).sum(1)


class Recurrent(nn.Module):
    """An LSTM beside a convolution over the same sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.convolution = nn.Sequential(nn.Conv1d(4, 10, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        recurrent, (hidden, _) = self.lstm(x)
        local = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return (recurrent * local).sum((1, 2)) + hidden.mean((0, 2))


class Transformers(nn.Module):
    """Towers of attention and normalisation."""

    def __init__(self, towers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True, activation="gelu")
            for _ in range(towers)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([tower(x) for tower in self.towers]).mean(0)


class Frozen(nn.Module):
    """A branch without trainable parameters, one that is partly frozen, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(mlp(6, 8, 4) for _ in range(3))
        self.paths[0].requires_grad_(False)
        self.paths[1][0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], 1)


class Constants(nn.Module):
    """Buffers that several branches read, tensors made on the way, numbers of Python's."""

    scale: Tensor

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.left, self.right = mlp(6, 8, 4), mlp(6, 8, 4)
        self.factor = factor
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x) * self.scale + torch.arange(4, device=x.device) * self.factor
        right = self.right(x).masked_fill(torch.eye(5, 4, device=x.device, dtype=torch.bool), -1.0) * self.scale
        return torch.where(left > 0, left, right * x.shape[1])


class ChannelsLast(nn.Module):
    """Branches whose tensors are not row-major."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        left, right = self.left(x).tanh(), self.right(x).permute(0, 2, 3, 1).relu()
        return left * 2, right + left.permute(0, 2, 3, 1)


class ModesInside(nn.Module):
    """Parts of a branch that run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(6, 8, 4), mlp(6, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        with torch.no_grad():
            peak = left.abs().max(1, keepdim=True).values
        return left / (1 + peak) + self.right(x).tanh()


class Three(nn.Module):
    """A trunk, three branches of the same size, a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4)) for _ in range(3)
        )
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        return self.head(torch.cat([path(x) for path in self.paths], 1))


class Masks(nn.Module):
    """A worker's result without gradient, which the lead keeps for its backward; a region with slots as large."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        y = torch.sigmoid(x * self.scale) * (classes * 0.125).cos().exp().sin().exp()
        return self.head(torch.cat([y.tanh(), y.cos().sin().exp().sin()], 1))


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(3, 7, 4),)


def tokens() -> tuple[Tensor, ...]:
    return torch.randint(0, 11, (5, 3)), torch.randint(0, 13, (5, 4))


SMALL = {
    "inception": Case(Inception, images, (4,)),
    "pathnet": Case(PathNet, rows, (3, 3)),
    "towers": Case(Towers, lambda: (*rows(), *rows(width=5)), (2,)),
    "heads": Case(Heads, rows, (3,)),
    "in place": Case(InPlace, rows, (2,)),
    "googlenet": Case(GoogLeNet, images, (4,) * 9),
    "nested forks": Case(NestedForks, rows, (2, 2)),
    "batch norm": Case(Norms, rows, (3, 2)),
    "dropout": Case(Dropouts, rows, (4,), used=2),
    "shared parameter": Case(SharedParameter, rows, (3,)),
    "tied weight": Case(TiedWeight, rows, (2,)),
    "several tensors": Case(SeveralTensors, rows, (2, 2), forward_only=(1,)),
    "views out": Case(ViewsOut, rows, (3,)),
    "output too": Case(OutputToo, rows, (2,)),
    "residual chain": Case(ResidualChain, rows, ()),
    "projected residuals": Case(ProjectedResiduals, rows, (2, 2, 2)),
    "embeddings": Case(Embeddings, tokens, (2,)),
    "recurrent": Case(Recurrent, sequences, (2, 2)),
    "transformers": Case(Transformers, lambda: (torch.randn(2, 5, 8),), (3,)),
    "frozen": Case(Frozen, rows, (3,)),
    "constants": Case(Constants, rows, (2,)),
    "channels last": Case(ChannelsLast, images, (2, 2)),
    "masks": Case(Masks, lambda: (*rows(), torch.randint(0, 11, (5, 6))), (2, 2), forward_only=(0,)),
    "modes inside": Case(ModesInside, rows, (2,)),
}


def why_not_here(name: str) -> str | None:
    """Why torch itself cannot compile one of these networks in this version."""
    if name == "recurrent" and torch.__version__ < (2, 12):
        return "fake tensors of torch 2.11 give an LSTM's state another shape"
    return None
