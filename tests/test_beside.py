"""Gradients of convolutions' weights beside the rest of backward: which, and that nobody can tell."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import assert_transparent, graph_of, noted, on_captured
from images import (
    BODIES,
    OF_THREE,
    Fork,
    Programme,
    ask_for_channels_last,
    ask_for_gradients_beside,
    assert_same_as_plain,
)
from networks import SMALL
from torch import Tensor, nn

from mpsrun.graph.effects import analyze
from mpsrun.graph.weights import own_weights
from mpsrun.run import beside
from mpsrun.run.beside import Beside, conv2d
from mpsrun.run.captured import Captured

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, with their weights' gradients beside."""
    ask_for_gradients_beside(monkeypatch)
    return noted(monkeypatch)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the gradients that were computed beside."""
    shapes: list[tuple[int, ...]] = []
    run = Beside.run

    def note(self: Beside, function: Any, reads: Any) -> Any:
        result = run(self, function, reads)
        shapes.append(tuple(result[0].shape))
        return result

    monkeypatch.setattr(Beside, "run", note)
    return shapes


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_nobody_can_tell(name: str, last: bool, made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    if last:
        ask_for_channels_last(monkeypatch)
    assert_same_as_plain(lambda: Fork(BODIES[name]), made)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("name", sorted({*BODIES} - {*OF_THREE}))
def test_kernels_of_one_pixel(name: str, memory_format: torch.memory_format, made: list[Captured]) -> None:
    if name in ("asks for strides", "asks for order", "as rows of memory") and memory_format is LAST:
        pytest.skip("other strides are other results")
    assert_same_as_plain(lambda: Fork(BODIES[name], 1), made, memory_format=memory_format)


@pytest.mark.parametrize("seed", range(8))
def test_programmes_drawn_by_chance(seed: int, made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_channels_last(monkeypatch)
    assert_same_as_plain(lambda: Programme(seed), made)


@pytest.mark.parametrize("name", sorted({*SMALL} - {"residual chain"}))  # which has no branches
def test_other_networks(name: str, made: list[Captured]) -> None:
    assert_transparent(name, on_captured, made)


def test_each_convolution_has_its_own(made: list[Captured], found: list[tuple[int, ...]]) -> None:
    """Of the stem and of two on each branch, in each of two replays."""
    assert_same_as_plain(lambda: Fork(BODIES["convolutions"]), made)
    assert sorted(found) == sorted([(4, 3, 3, 3), *[(4, 4, 3, 3)] * 4] * 2)


class Weights(nn.Module):
    """Convolutions whose weights are read once, twice, and made."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.made = (nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(3))
        self.register_buffer("fixed", torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.conv2d(x, self.twice), weight=self.once)
        return F.conv2d(F.conv2d(F.conv2d(x, self.twice), self.made * 2), self.fixed)


BIASES: dict[str, Any] = {
    "made": lambda net, x: F.conv2d(x, net.weight, net.bias * 2),
    "of two": lambda net, x: F.conv2d(x, net.weight, net.bias) + F.conv2d(x, net.other, net.bias),
    "read elsewhere": lambda net, x: F.conv2d(x, net.weight, bias=net.bias) * net.bias.sum(),
    "weight as images": lambda net, _: F.conv2d(net.weight, net.weight),
    "frozen": lambda net, x: F.conv2d(x, net.frozen),
}


class Parameters(nn.Module):
    """A convolution in the way of `body`."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.weight, self.other = (nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(2))
        self.frozen = nn.Parameter(torch.randn(4, 4, 1, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@pytest.mark.parametrize("name", BIASES)
def test_what_another_op_would_have_to_wait_for_is_not_beside(name: str) -> None:
    """Autograd adds gradients up, or hands them on, where the convolution was."""
    gm = graph_of(Parameters(BIASES[name]), torch.randn(1, 4, 3, 3))
    assert not own_weights(gm, analyze(gm))


def test_only_weights_that_nothing_else_reads() -> None:
    gm = graph_of(Weights(), torch.randn(1, 4, 3, 3))
    (weight,) = own_weights(gm, analyze(gm)).values()
    assert "once" in weight.name


GEOMETRIES: list[tuple[int, tuple[Any, ...]]] = [
    (3, (1, 1)),
    (3, (2, 1, 1, 2)),
    (1, ()),
    (3, ((2, 1), (1, 0), 2)),
    (3, (1, 1, 1, 4)),
]


@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_one_convolution(kernel: int, geometry: tuple[Any, ...], bias: bool, last: bool, cast: bool) -> None:
    """Values, gradients, dtypes and the strides of the weight's gradient are those of torch's own."""
    torch.manual_seed(0)
    groups = geometry[3] if len(geometry) > 3 else 1
    images = torch.randn(2, 4, 9, 8).requires_grad_()
    weight = torch.randn(4, 4 // groups, kernel, kernel).requires_grad_()
    wanted = [images, weight, *([torch.randn(4).requires_grad_()] if bias else [])]
    results = []
    for mine in (True, False):
        given = images.contiguous(memory_format=LAST) if last else images
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), Beside().forward():
            operands = (given, weight, wanted[2] if bias else None, *geometry)
            result = conv2d(*operands, weight_format=LAST if last else None) if mine else F.conv2d(*operands)
        assert (type(result.grad_fn).__name__ == "_ConvolutionBackward") is mine
        results.append([result, *torch.autograd.grad(result.square().sum(), wanted)])
    assert results[0][2].stride() == weight.stride()
    for own, torchs in zip(*results, strict=True):
        torch.testing.assert_close(own, torchs)


def frozen(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return images, weight.requires_grad_(False), {}


@pytest.mark.parametrize(
    "change",
    [
        frozen,
        lambda images, weight: (images.detach(), weight, {}),
        lambda images, weight: (images, weight, {"padding": "same"}),
        lambda images, weight: (images[0], weight, {}),
        lambda images, weight: (images.to(torch.cfloat), weight.to(torch.cfloat), {}),
    ],
)
def test_what_torch_computes_itself(change: Any) -> None:
    """Frozen weights, inputs without gradients, paddings in words, an image by itself, complex numbers."""
    images, weight, options = change(torch.randn(2, 4, 6, 6).requires_grad_(), torch.randn(4, 4, 3, 3).requires_grad_())
    with Beside().forward():
        result = conv2d(images, weight, **options)
    assert type(result.grad_fn).__name__ != "_ConvolutionBackward"
    torch.testing.assert_close(result, F.conv2d(images, weight, **options))


def test_outside_of_a_recording_it_is_torchs() -> None:
    images, weight = torch.randn(2, 4, 6, 6).requires_grad_(), torch.randn(4, 4, 3, 3).requires_grad_()
    assert beside.Beside.current() is None
    result = conv2d(images, weight, weight_format=LAST)
    assert type(result.grad_fn).__name__ == "ConvolutionBackward0"
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert gradient.stride() == weight.stride()
