"""Small networks, and Dynamo's graphs of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from mpsrun.graph.effects import Effects, analyze
from mpsrun.graph.regions import Regions, find_regions


class Captured:
    """A graph as Dynamo hands it to a backend, with what is found in it."""

    def __init__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        self.gm = gm
        self.effects: Effects = analyze(gm)
        self.found: Regions = find_regions(gm, self.effects)
        self.inputs: list[Any] = example_inputs

    def node(self, name: str) -> fx.Node:
        """The first node whose target's name is `name`."""
        for node in self.gm.graph.nodes:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if node.op in ("call_function", "call_method") and target == name:
                return node
        raise LookupError(f"no {name} in {[node.name for node in self.gm.graph.nodes]}")

    def shape(self) -> list[int]:
        """How many branches each region has."""
        return [len(region.branches) for region in self.found.regions]


def capture(model: Callable[..., Any], *inputs: Any, **options: Any) -> Captured:
    """Compile and run `model` once; the (only) graph, the real tensors it was called with."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = Captured(gm, example_inputs)
        graphs.append(captured)

        def run(*args: Any) -> Any:
            captured.inputs = list(args)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(model, backend=backend, **options)(*inputs)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0]


class ConvNormRelu(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Inception(nn.Module):
    """Four branches of `width` channels each."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = ConvNormRelu(inputs, width)
        self.three = nn.Sequential(ConvNormRelu(inputs, width), ConvNormRelu(width, width, 3))
        self.twice = nn.Sequential(ConvNormRelu(inputs, width), ConvNormRelu(width, width, 3))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNormRelu(inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.twice(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """Stem, nine inception blocks, classifier."""

    def __init__(self, blocks: int = 9, width: int = 2) -> None:
        super().__init__()
        channels = 4 * width
        self.stem = ConvNormRelu(1, channels, 3)
        self.blocks = nn.Sequential(*(Inception(channels, width) for _ in range(blocks)))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(self.dropout(x))
