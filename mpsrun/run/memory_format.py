"""Tensors put into another order in memory, with gradients in the order that their tensor had."""

from __future__ import annotations

from typing import Any

import torch

from mpsrun.run.forkjoin import Function
from mpsrun.run.layout import contiguous_stride


def in_format(value: Any, memory_format: torch.memory_format) -> Any:
    """A tensor in this memory format, copied where it has another; anything else as it is.

    Sizes of 1 leave strides open: these are as the format has them where it is PyTorch's usual one, which others may
    look at.
    """
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return value
    if memory_format is torch.contiguous_format and value.stride() == contiguous_stride(value.shape):
        return value
    if memory_format is torch.channels_last and value.is_contiguous(memory_format=memory_format):
        # a kernel of one pixel has both formats at once, and its gradient either
        return _Turned.apply(value, None) if value.requires_grad and value.is_contiguous() else value
    return _Turned.apply(value, memory_format)


class _Turned(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, memory_format: torch.memory_format | None) -> torch.Tensor:
        ctx.stride = dense_stride(value)
        return value.view_as(value) if memory_format is None else value.clone(memory_format=memory_format)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return with_stride(gradient, ctx.stride), None


def dense_stride(value: torch.Tensor) -> tuple[int, ...]:
    """The strides that a gradient of this tensor of images has: its own, where it is dense."""
    is_dense = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
    return value.stride() if is_dense else contiguous_stride(value.shape)


def with_stride(value: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor with these strides, copied where another order in memory takes it."""
    sizes = zip(value.shape, value.stride(), stride, strict=True)
    if all(size == 1 or mine == its for size, mine, its in sizes):
        return value if value.stride() == stride else value.as_strided(value.shape, stride)
    return value.new_empty_strided(value.shape, stride).copy_(value)  # also where a transform has batched it
