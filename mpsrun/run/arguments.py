"""The arguments of a recording: those that it reads where they are, and those that have memory of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from mpsrun.errors import NotShippable
from mpsrun.run.executor import copy_all


class Arguments:
    """What a graph is recorded with, made after the arguments of one call.

    own: one for each of these; a static one is the same memory. wanted: those that have a gradient. Raises
    `NotShippable` where an argument has no memory of a kind that can be copied to.
    """

    def __init__(self, args: Sequence[Any], statics: Collection[int]) -> None:
        self._statics = [*statics]
        self._copied = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in statics]
        self._pointers = [arg.data_ptr() if i in statics else None for i, arg in enumerate(args)]
        self._metas = self._metas_of(args)
        grad = torch.is_grad_enabled()
        self.wanted = [i for i, a in enumerate(args) if grad and isinstance(a, torch.Tensor) and a.requires_grad]
        self.own = [self._made(i, arg) for i, arg in enumerate(args)]
        self._targets = [self.own[i].data for i in self._copied]  # whose versions autograd does not follow

    def _made(self, i: int, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        own = _empty_like(arg) if i in self._copied else arg.data
        return own.requires_grad_() if i in self.wanted else own

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [arg for arg in self.own if isinstance(arg, torch.Tensor)]

    def fit(self, args: Sequence[Any]) -> bool:
        """Whether everything is where it was, and as large."""
        return _stand_at(args, self._pointers, self._statics) and self._metas_of(args) == self._metas

    def take(self, args: Sequence[Any]) -> None:
        """Copy what is not read where it is."""
        copy_all(self._targets, [args[i] for i in self._copied])

    def _metas_of(self, args: Sequence[Any]) -> list[Any]:
        return [(args[i].shape, args[i].stride(), args[i].dtype, args[i].requires_grad) for i in self._copied]


def _stand_at(args: Sequence[Any], pointers: Sequence[int | None], places: Sequence[int]) -> bool:
    """Whether the arguments at these places are where the pointers say."""
    if _pointers_equal is not None:
        return _pointers_equal(list(args), pointers, places)
    return [args[i].data_ptr() for i in places] == [pointers[i] for i in places]


# Three times as fast; a torch without CUDA has none.
_pointers_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def _empty_like(arg: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with the same strides. Raises `NotShippable` where elements lie over each other."""
    if any(stride == 0 and extent > 1 for extent, stride in zip(arg.shape, arg.stride(), strict=True)):
        raise NotShippable("an input is an expanded tensor")
    return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device)
