"""Max pooling of images whose channels come last: its gradient by a sum where the maxima were.

Torch's own kernel for that takes many times as long as the one for PyTorch's usual order of channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mpsrun.run.forkjoin import Function

SUMMED = frozenset({torch.float32, torch.float64})  # in others a sum of up to nine would be less exact than torch's


def max_pool2d(input: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 - as torch calls it
    """The maxima as `torch.nn.functional.max_pool2d` finds them; gradients are sums in an order of their own."""
    last = input.is_contiguous(memory_format=torch.channels_last)
    if not last or input.dtype not in SUMMED or torch.are_deterministic_algorithms_enabled():
        return F.max_pool2d(input, *args, **kwargs)
    return _MaxPool.apply(input, args, kwargs)


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        maxima, indices = F.max_pool2d(images, *args[:5], **kwargs | {"return_indices": True})
        ctx.save_for_backward(indices)
        ctx.shape = images.shape
        return maxima

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        count, channels, height, width = ctx.shape
        zeros = gradient.new_zeros(count, height * width, channels)
        found = zeros.scatter_add(1, _by_pixel(indices), _by_pixel(gradient))
        return found.view(count, height, width, channels).permute(0, 3, 1, 2), None, None


def _by_pixel(images: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    return images.permute(0, 2, 3, 1).reshape(count, height * width, channels)
