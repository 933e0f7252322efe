"""Where everything of a crossing stands in its slots, worked out once for given shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mpsrun.device import TensorRef
from mpsrun.device.arena import ALIGN_BYTES
from mpsrun.device.base import dtype_name
from mpsrun.graph.program import Program, State, build
from mpsrun.graph.state import applied
from mpsrun.wire.messages import Place


@dataclass(frozen=True)
class TensorMeta:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(shape, stride, tensor.dtype, tensor.device, tensor.requires_grad)

    def empty(self) -> torch.Tensor:
        """A tensor like this one (a fake one under a FakeTensorMode)."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Gradients:
    """What autograd will do with a program.

    differentiable: by output, whether it requires a gradient. reach: by output, the inputs that get a gradient when
    this output has one. saved: inputs that backward will read again.
    """

    differentiable: tuple[bool, ...]
    reach: tuple[frozenset[int], ...]
    saved: frozenset[int]

    def reached(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """The inputs which get a gradient from these outputs, in order."""
        return tuple(sorted(frozenset().union(*(self.reach[i] for i in outputs))))


def trace_gradients(program: Program, inputs: Sequence[TensorMeta | int], state: State) -> Gradients:
    """What autograd will do with a program."""
    return follow_gradients(build(program), inputs, state)


def follow_gradients(function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[Any], state: State) -> Gradients:
    """Run a function on fake tensors and read off its autograd graph. No memory is used, no kernel runs.

    inputs: its arguments, with metas in the place of tensors.
    """
    with torch.inference_mode(False), FakeTensorMode(allow_non_fake_inputs=True):
        values = [x.empty() if isinstance(x, TensorMeta) else x for x in inputs]
        leaves = {id(v): i for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
        storages = {v.untyped_storage()._cdata: i for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
        saved: set[int] = set()

        def pack(tensor: torch.Tensor) -> None:
            """Keeps nothing: an op that saved its own result so would never be freed."""
            index = storages.get(tensor.untyped_storage()._cdata)
            if index is not None:
                saved.add(index)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept), applied(state):
            outputs = function(*values)
        reach = [_reachable(output, leaves) for output in outputs]
        return Gradients(tuple(o.requires_grad for o in outputs), tuple(reach), frozenset(saved))


def _reachable(output: torch.Tensor, leaves: dict[int, int]) -> frozenset[int]:
    found: set[int] = set()
    seen: set[object] = set()
    stack = [output.grad_fn] if output.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            found.add(leaves[id(variable)])
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return frozenset(found)


class Packer:
    """Gives tensors their places in a slot, one after the other."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def align(self, align_bytes: int = ALIGN_BYTES) -> None:
        """Start the next tensor at a multiple of this."""
        self.size_bytes = -(-self.size_bytes // align_bytes) * align_bytes

    def place(self, index: int, meta: TensorMeta, align_bytes: int = ALIGN_BYTES) -> Place:
        """Room for a tensor like `meta`; a stride that overlaps or leaves gaps becomes a contiguous one."""
        self.align(align_bytes)
        start = self.size_bytes
        stride = meta.stride if is_dense(meta) else contiguous_stride(meta.shape)
        count = 1
        for extent in meta.shape:
            count *= extent
        self.size_bytes = start + count * meta.dtype.itemsize
        ref = TensorRef(0, start, meta.shape, stride, dtype_name(meta.dtype))
        return Place(index, ref, meta.requires_grad)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    sizes = [max(1, n) for n in reversed(shape[1:])] if shape else []
    return tuple(reversed(list(itertools.accumulate(sizes, lambda a, b: a * b, initial=1)))) if shape else ()


def is_dense(meta: TensorMeta) -> bool:
    """Whether the strides are a permutation of row-major ones: no overlap, no gaps."""
    expected = 1
    for stride, extent in sorted(zip(meta.stride, meta.shape, strict=True)):
        if extent == 1:
            continue
        if stride != expected:
            return False
        expected *= extent
    return 0 not in meta.shape
