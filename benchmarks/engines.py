"""The ways to run a network that are compared: from a module to what the training step calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsrun.run.backend import mpsrun

Call = Callable[..., Any]
AUTO = "mpsrun auto"
FORCED = ("mpsrun serial", "mpsrun streams", "mpsrun captured", "mpsrun workers")
WARM_UP_STEPS = 6
MOST_WARM_UP_STEPS = 1000  # `auto` waits until the workers are ready, then tries its candidates


def eager(model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """Plain PyTorch."""
    return model


def inductor(mode: str | None, model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """PyTorch's own compiler."""
    return torch.compile(model, mode=mode)


def cuda_graph(model: nn.Module, inputs: Sequence[Tensor], bf16: bool) -> Call:
    """Forward and backward pass of the whole network as one CUDA graph each.

    Raises RuntimeError, or what capturing raises, where this cannot be done.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("needs an NVIDIA GPU")
    # Casts that autocast keeps would be kept from one replay to the next; the graph holds them anyway.
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, tuple(inputs), allow_unused_input=True)


def lanes(kind: str, model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """mpsrun, with one kind of lane forced or with its own choice."""
    return torch.compile(model, backend=mpsrun, options={"lanes": kind})


ENGINES: dict[str, Callable[[nn.Module, Sequence[Tensor], bool], Call]] = {
    "eager": eager,
    "compile": functools.partial(inductor, None),
    "reduce-overhead": functools.partial(inductor, "reduce-overhead"),
    "cuda graph": cuda_graph,
    **{name: functools.partial(lanes, name.removeprefix("mpsrun ")) for name in (*FORCED, AUTO)},
}
