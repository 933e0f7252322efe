"""Gradients of convolutions' weights beside the rest of a recorded backward pass.

The layers before a convolution wait for the gradient of its input; that of its weight nobody needs before the end of
the step. Torch computes both one after the other. Here the second is computed on a stream of its own:

    a lane           gradient of its output ─┬─> of its input ──> the layer before ──> ...
    the one beside                           └─> of its weight

What it reads stays until it has been read. So that backward needs no more memory than that, a lane waits for the oldest
of a few such gradients before it goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.modules.utils import _pair

from mpsrun.run.forkjoin import Function
from mpsrun.run.memory_format import dense_stride, in_format, with_stride
from mpsrun.run.streams import stream_beside

Result = TypeVar("Result")
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups
MOST_WAITING = 8  # gradients of weights for which a lane does not wait yet
CAST = frozenset({torch.float32, torch.float16, torch.bfloat16})  # what autocast puts into another dtype
# On a GPU those that need no workspace of cuBLAS, of which a stream beside a lane has none.
BACKENDS = frozenset({"Cudnn", "CudaDepthwise2d"})


class Beside:
    """The gradients of weights of one recording."""

    _local = threading.local()

    def __init__(self) -> None:
        self._waiting: dict[torch.cuda.Stream, deque[tuple[torch.cuda.Event, Sequence[Tensor]]]] = {}

    @classmethod
    def current(cls) -> Beside | None:
        """That of the forward which this thread records."""
        return getattr(cls._local, "current", None)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Under this convolutions are recorded whose weights have their gradients beside."""
        self._local.current = self
        try:
            yield
        finally:
            self._local.current = None

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward of what was recorded under `forward`; behind it all gradients are there."""
        try:
            yield
            for beside in filter(None, map(stream_beside, self._waiting)):
                torch.cuda.current_stream(beside.device).wait_stream(beside)
        finally:
            self._waiting.clear()

    def run(self, function: Callable[[], Result], reads: Sequence[Tensor]) -> Result:
        """The result of `function`, computed beside the current stream from `reads` and what never goes."""
        if not reads[0].is_cuda or not torch.cuda.is_current_stream_capturing():
            return function()
        stream = torch.cuda.current_stream(reads[0].device)
        beside = stream_beside(stream)
        if beside is None:
            return function()
        waiting = self._waiting.setdefault(stream, deque())
        beside.wait_stream(stream)
        with torch.cuda.stream(beside):
            result = function()
        waiting.append((beside.record_event(), reads))
        if len(waiting) > MOST_WAITING:
            done, _ = waiting.popleft()
            stream.wait_event(done)
        return result


def conv2d(
    input: Tensor,  # noqa: A002 - as torch calls it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    weight_format: torch.memory_format | None = None,
) -> Tensor:
    """`torch.conv2d`, in a recording with the weight's gradient beside; `weight`: one that nothing else reads.

    weight_format: what the weight is to be put in, if so.
    """
    beside, dtype = Beside.current(), _autocast_dtype(input)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups) if not isinstance(padding, str) else None
    if beside is None or geometry is None or not _gains(input, weight, bias, geometry, dtype):
        used = weight if weight_format is None else in_format(weight, weight_format)
        return torch.conv2d(input, used, bias, stride, padding, dilation, groups)
    images = input if dtype is None else input.to(dtype)
    result: Tensor = _Convolution.apply(beside, images, weight, bias, geometry, dtype, weight_format)
    return result


def _autocast_dtype(images: Tensor) -> torch.dtype | None:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _gains(images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype | None) -> bool:
    """Whether both gradients are wanted, and the one of the weight can be computed elsewhere."""
    if not (torch.is_grad_enabled() and images.requires_grad and weight.requires_grad and images.dim() == 4):
        return False
    if not (images.is_floating_point() and weight.is_floating_point()):  # complex ones are several convolutions
        return False
    if dtype is not None and not {images.dtype, weight.dtype} <= CAST:
        return False
    stride, padding, dilation, groups = geometry
    backend = torch._C._select_conv_backend(images, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return backend.name in BACKENDS or not images.is_cuda


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        beside: Beside,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        dtype: torch.dtype | None,
        weight_format: torch.memory_format | None,
    ) -> Tensor:
        used = weight if dtype is None else weight.to(dtype)
        if weight_format is not None:
            used = used.contiguous(memory_format=weight_format)
        ctx.beside, ctx.geometry = beside, geometry
        ctx.dtype, ctx.stride = weight.dtype, None if weight_format is None else dense_stride(weight)
        ctx.bias = None if bias is None else (bias.dtype, list(bias.shape))
        ctx.save_for_backward(images, used)
        return torch.conv2d(images, used, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        images, used = ctx.saved_tensors
        # As each of the two would have it copied.
        gradient = gradient.contiguous(memory_format=suggest_memory_format(images))
        stride, padding, dilation, groups = ctx.geometry
        sizes = None if ctx.bias is None else ctx.bias[1]

        def gradients(*mask: bool) -> tuple[Tensor, Tensor, Tensor]:
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
                gradient, images, used, sizes, stride, padding, dilation, False, [0, 0], groups, mask
            )
            return found

        def of_parameters() -> tuple[Tensor, Tensor | None]:
            _, weight, bias = gradients(False, True, ctx.needs_input_grad[3])
            weight = weight if ctx.stride is None else with_stride(weight, ctx.stride)
            return weight.to(ctx.dtype), None if bias is None else bias.to(ctx.bias[0])

        weight, bias = ctx.beside.run(of_parameters, (gradient, images, used))
        return None, gradients(True, False, False)[0], weight, bias, None, None, None
