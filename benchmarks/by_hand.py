"""Branches put on streams by hand, network by network: what mpsrun is compared with, in stock PyTorch alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_streams: list[torch.cuda.Stream] = []


def beside(*branches: tuple[Any, ...], first: int = 0) -> list[Tensor]:
    """What each function returns for the tensors behind it, each on a stream of its own from number `first` on.

    Backward takes the same streams: autograd runs the backward of an op where its forward ran. A fork inside a branch
    needs numbers that its siblings do not use. On a CPU one branch follows the other.
    """
    if not branches[0][1].is_cuda:
        return [function(*inputs) for function, *inputs in branches]
    while len(_streams) < first + len(branches):
        _streams.append(torch.cuda.Stream())
    streams = _streams[first : first + len(branches)]
    main = torch.cuda.current_stream()
    fork = main.record_event()
    outputs = []
    for stream, (function, *inputs) in zip(streams, branches, strict=True):
        stream.wait_event(fork)
        for value in inputs:
            value.record_stream(stream)  # its memory is not used again before the branch is done with it
        with torch.cuda.stream(stream):
            outputs.append(function(*inputs))
    for stream, output in zip(streams, outputs, strict=True):
        main.wait_stream(stream)
        output.record_stream(main)
    return outputs


def total(terms: list[Tensor]) -> Tensor:
    """Added from left to right, as the networks do."""
    return functools.reduce(torch.add, terms)


def apart(*convolutions: Callable[[Tensor], Tensor], first: int) -> Callable[[Tensor], Tensor]:
    """Convolutions that read the same, joined along the channels."""
    return lambda x: torch.cat(beside(*((convolution, x) for convolution in convolutions), first=first), 1)


def inception(m: Any, x: Tensor) -> Tensor:
    return torch.cat(beside((m.one, x), (m.three, x), (m.five, x), (m.pool, x)), 1)


def towers(m: Any, x: Tensor) -> Tensor:
    x = m.embed(x)
    return m.head(total(beside(*((tower, x) for tower in m.towers))))


def pathnet(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    for layer in m.layers:
        x = total(beside(*((module, x) for module in layer)))
    return m.head(x.mean((2, 3)))


def two_towers(m: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    image, text = beside((m.image, images), (m.text, tokens))
    return functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)


def ensemble(m: Any, x: Tensor) -> Tensor:
    return torch.stack(beside(*((member, x) for member in m.members))).mean(0)


def wide(m: Any, x: Tensor) -> Tensor:
    x = x * m.gain
    left, right = beside((lambda y: total([y, *m.left]), x), (lambda y: total([y, *m.right]), x))
    return left * right


def inception_a(m: Any, x: Tensor) -> Tensor:
    five = nn.Sequential(m.branch5x5_1, m.branch5x5_2)
    three = nn.Sequential(m.branch3x3dbl_1, m.branch3x3dbl_2, m.branch3x3dbl_3)
    return torch.cat(beside((m.branch1x1, x), (five, x), (three, x), (_pooled(m.branch_pool), x)), 1)


def inception_b(m: Any, x: Tensor) -> Tensor:
    three = nn.Sequential(m.branch3x3dbl_1, m.branch3x3dbl_2, m.branch3x3dbl_3)
    return torch.cat(beside((m.branch3x3, x), (three, x), (_smaller, x)), 1)


def inception_c(m: Any, x: Tensor) -> Tensor:
    seven = nn.Sequential(m.branch7x7_1, m.branch7x7_2, m.branch7x7_3)
    twice = nn.Sequential(*(getattr(m, f"branch7x7dbl_{i}") for i in range(1, 6)))
    return torch.cat(beside((m.branch1x1, x), (seven, x), (twice, x), (_pooled(m.branch_pool), x)), 1)


def inception_d(m: Any, x: Tensor) -> Tensor:
    three = nn.Sequential(m.branch3x3_1, m.branch3x3_2)
    seven = nn.Sequential(*(getattr(m, f"branch7x7x3_{i}") for i in range(1, 5)))
    return torch.cat(beside((three, x), (seven, x), (_smaller, x)), 1)


def inception_e(m: Any, x: Tensor) -> Tensor:
    three_ends = apart(m.branch3x3_2a, m.branch3x3_2b, first=4)
    twice_ends = apart(m.branch3x3dbl_3a, m.branch3x3dbl_3b, first=6)
    return torch.cat(
        beside(
            (m.branch1x1, x),
            (lambda y: three_ends(m.branch3x3_1(y)), x),
            (lambda y: twice_ends(m.branch3x3dbl_2(m.branch3x3dbl_1(y))), x),
            (_pooled(m.branch_pool), x),
        ),
        1,
    )


def _pooled(convolution: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: convolution(functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1))


def _smaller(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, kernel_size=3, stride=2)


def high_resolution(m: Any, resolutions: list[Tensor]) -> list[Tensor]:
    """One branch for each resolution, then one for each that comes out of all of them."""
    own = beside(*zip(m.branches, resolutions, strict=True))
    if m.num_branches == 1:
        return own

    def fused(layers: nn.ModuleList, *parts: Tensor) -> Tensor:
        return m.fuse_act(total([layer(part) for layer, part in zip(layers, parts, strict=True)]))

    return beside(*((functools.partial(fused, layers), *own) for layers in m.fuse_layers))


BY_HAND: dict[str, Callable[..., Any]] = {
    "examples.networks.Inception": inception,
    "examples.networks.Towers": towers,
    "examples.networks.PathNet": pathnet,
    "examples.networks.TwoTowers": two_towers,
    "examples.networks.Ensemble": ensemble,
    "examples.networks.Wide": wide,
    "torchvision.models.inception.InceptionA": inception_a,
    "torchvision.models.inception.InceptionB": inception_b,
    "torchvision.models.inception.InceptionC": inception_c,
    "torchvision.models.inception.InceptionD": inception_d,
    "torchvision.models.inception.InceptionE": inception_e,
    "timm.models.hrnet.HighResolutionModule": high_resolution,
}


def put_on_streams(model: nn.Module) -> None:
    """Give the modules of `BY_HAND` the forward that stands there. Raises ValueError where the model has none."""
    found = 0
    for module in model.modules():
        forward = BY_HAND.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if forward is not None:
            module.forward = functools.partial(forward, module)
            found += 1
    if not found:
        raise ValueError(f"expected a module that was split by hand, found none in {type(model).__name__}")
