"""Networks with independent branches, small enough to read: GoogLeNet, towers, PathNet, encoders, ensembles."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out, eps=1e-3), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Four branches side by side, joined along the channels (Szegedy et al., arXiv 1409.4842)."""

    def __init__(self, channels: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.one = conv(channels, one, 1)
        self.three = nn.Sequential(conv(channels, three[0], 1), conv(*three, 3))
        self.five = nn.Sequential(conv(channels, five[0], 1), conv(*five, 3))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv(channels, pool, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


# One row a block: channels of the 1x1 branch, of the 3x3 and 5x5 branches (reduced, then out), of the pool branch.
BLOCKS = (
    ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64)),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128)),
)


class GoogLeNet(nn.Module):
    """Nine Inception blocks in three stages.

    `width` scales the channels; `stem_stride` is 2 for photographs of 224 pixels and 1 for small pictures.
    """

    def __init__(self, classes: int, width: float = 1.0, colours: int = 3, stem_stride: int = 2) -> None:
        super().__init__()
        wide = lambda n: max(4, int(n * width))  # noqa: E731
        halve = lambda: nn.MaxPool2d(3, 2, padding=1)  # noqa: E731
        layers: list[nn.Module] = [conv(colours, wide(64), 7 if stem_stride > 1 else 3, stem_stride)]
        if stem_stride > 1:
            layers.append(halve())
        layers += [conv(wide(64), wide(64), 1), conv(wide(64), wide(192), 3)]
        channels = wide(192)
        for stage in BLOCKS:
            layers.append(halve())
            for one, three, five, pool in stage:
                threes, fives = (wide(three[0]), wide(three[1])), (wide(five[0]), wide(five[1]))
                layers.append(Inception(channels, wide(one), threes, fives, wide(pool)))
                channels = wide(one) + threes[1] + fives[1] + wide(pool)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Towers(nn.Module):
    """Transformer towers that read the same sequence and add up."""

    def __init__(
        self, towers: int = 4, width: int = 512, layers: int = 6, features: int = 64, classes: int = 100
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

        self.towers = nn.ModuleList(nn.Sequential(*(layer() for _ in range(layers))) for _ in range(towers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        total = self.towers[0](x)
        for tower in self.towers[1:]:
            total = total + tower(x)
        return self.head(total)


class PathNet(nn.Module):
    """Layers of modules side by side that add up (Fernando et al., arXiv 1701.08734), every path active."""

    def __init__(self, layers: int = 6, modules: int = 8, channels: int = 64, classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)

        def module() -> nn.Module:
            return nn.Sequential(conv(channels, channels, 3), conv(channels, channels, 3))

        self.layers = nn.ModuleList(nn.ModuleList(module() for _ in range(modules)) for _ in range(layers))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            outputs = [module(x) for module in layer]
            x = outputs[0]
            for output in outputs[1:]:
                x = x + output
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv(channels, out, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class ImageEncoder(nn.Sequential):
    """A small ResNet: images of shape (N, 3, H, W) to vectors of shape (N, size)."""

    def __init__(self, size: int, width: int = 64, blocks: int = 3) -> None:
        layers: list[nn.Module] = [conv(3, width, 3, 2)]
        channels = width
        for stage in range(4):
            for block in range(blocks):
                out = width * 2**stage
                layers.append(Residual(channels, out, 2 if stage and not block else 1))
                channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, size))


class TextEncoder(nn.Module):
    """A transformer: tokens of shape (N, length), integers below `words`, to vectors of shape (N, size)."""

    def __init__(self, size: int, words: int, length: int, width: int = 512, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

        self.layers = nn.Sequential(*(layer() for _ in range(layers)))
        self.head = nn.Linear(width, size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(tokens) + self.position).mean(1))


class TwoTowers(nn.Module):
    """An encoder for images beside one for text, trained to agree on pairs (Radford et al., arXiv 2103.00020)."""

    def __init__(self, size: int = 256, words: int = 8192, length: int = 64) -> None:
        super().__init__()
        self.image = ImageEncoder(size)
        self.text = TextEncoder(size, words, length)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.image(images), self.text(tokens)
        return functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)


def contrastive_loss(outputs: tuple[torch.Tensor, torch.Tensor], temperature: float = 0.07) -> torch.Tensor:
    """Cross-entropy of finding each image's text in the batch, and each text's image."""
    image, text = (output.float() for output in outputs)
    scores = image @ text.T / temperature
    pairs = torch.arange(len(scores), device=scores.device)
    return (functional.cross_entropy(scores, pairs) + functional.cross_entropy(scores.T, pairs)) / 2


class Ensemble(nn.Module):
    """Convolutional networks of different widths whose logits are averaged."""

    def __init__(self, widths: tuple[int, ...] = (32, 40, 48, 64), depth: int = 5, classes: int = 100) -> None:
        super().__init__()
        self.members = nn.ModuleList(self._member(width, depth, classes) for width in widths)

    @staticmethod
    def _member(width: int, depth: int, classes: int) -> nn.Module:
        layers: list[nn.Module] = [conv(3, width, 3)]
        for stage in range(3):
            layers += [conv(width, width, 3, 2 if stage and not i else 1) for i in range(depth)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Wide(nn.Module):
    """Two branches of element-wise ops on large tensors: side by side they only compete for the cache of the GPU."""

    def __init__(self, width: int = 2**20, adds: int = 6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.left = nn.ParameterList(torch.randn(width) for _ in range(adds))
        self.right = nn.ParameterList(torch.randn(width) for _ in range(adds))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = right = x * self.gain
        for shift in self.left:
            left = left + shift
        for shift in self.right:
            right = right + shift
        return left * right
