"""The ways to run a network that are compared: from a module to what the training step calls."""

from __future__ import annotations

import functools
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import by_hand
from mpsrun import config
from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import STEPS_BEFORE_THRIFT
from mpsrun.run.in_place import compile_in_place
from mpsrun.run.keeping import STEPS_BEFORE_LENDING
from mpsrun.run.recorder import restoring

Call = Callable[..., Any]
AUTO = "mpsrun auto"
FORCED = tuple(f"mpsrun {lanes}" for lanes in get_args(config.Lanes) if lanes != "auto")
WITH_WORKERS = (*(engine for engine in FORCED if "workers" in engine), AUTO)
RECORDED = ("mpsrun captured", AUTO)
WARM_UP_STEPS = 6
STEPS_UNTIL_THRIFT = STEPS_BEFORE_THRIFT + STEPS_BEFORE_LENDING + 4
MOST_WARM_UP_STEPS = 1000  # `auto` waits until the workers are ready, then tries its candidates


def eager(model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """Plain PyTorch."""
    return model


def inductor(mode: str | None, model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """PyTorch's own compiler."""
    return torch.compile(model, mode=mode)


def cuda_graph(model: nn.Module, inputs: Sequence[Tensor], bf16: bool) -> Call:
    """Forward and backward pass of the whole network as one CUDA graph each.

    Raises RuntimeError, or what capturing raises, where this cannot be done; other engines can be measured after that.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("needs an NVIDIA GPU")
    # Casts that autocast keeps would be kept from one replay to the next; the graph holds them anyway.
    casts = torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False)
    graph = torch.cuda.graph

    def undisturbed(*args: Any, **options: Any) -> Any:
        """The thread that watches mpsrun's workers may look at the GPU meanwhile, which would end the capture."""
        return graph(*args, **(options | {"capture_error_mode": "thread_local"}))

    device, pool = torch.device("cuda", torch.cuda.current_device()), torch.cuda.graph_pool_handle()
    with casts, restoring(device, pool), unittest.mock.patch.object(torch.cuda, "graph", undisturbed):
        return torch.cuda.make_graphed_callables(model, tuple(inputs), allow_unused_input=True, pool=pool)


def compiled_graph(model: nn.Module, inputs: Sequence[Tensor], bf16: bool) -> Call:
    """What PyTorch's compiler makes, as one CUDA graph each for forward and backward."""
    return cuda_graph(torch.compile(model), inputs, bf16)


def streams_graph(model: nn.Module, inputs: Sequence[Tensor], bf16: bool) -> Call:
    """Branches put on streams by hand, within one CUDA graph each for forward and backward."""
    by_hand.put_on_streams(model)
    return cuda_graph(model, inputs, bf16)


def lanes(kind: str, model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """mpsrun, with one kind of lane forced."""
    return torch.compile(model, backend=mpsrun, options={"lanes": kind})


def own_choice(model: nn.Module, _inputs: Sequence[Tensor], _bf16: bool) -> Call:
    """mpsrun with its own choice, on a network that is compiled as under `mpsrun train.py`."""
    # A script's network would run plainly after an error of Dynamo's; here it must show.
    shown = {"suppress_errors": torch._dynamo.config.suppress_errors, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(shown):
        compile_in_place(model, {"lanes": "auto"})
    return model


ENGINES: dict[str, Callable[[nn.Module, Sequence[Tensor], bool], Call]] = {
    "eager": eager,
    "compile": functools.partial(inductor, None),
    "reduce-overhead": functools.partial(inductor, "reduce-overhead"),
    "cuda graph": cuda_graph,
    "compile in graph": compiled_graph,
    "streams in graph": streams_graph,
    **{name: functools.partial(lanes, name.removeprefix("mpsrun ")) for name in FORCED},
    AUTO: own_choice,
}
SLOW = ("compile", "reduce-overhead", "compile in graph")  # Inductor takes minutes: only those who ask get them
USUAL = tuple(engine for engine in ENGINES if engine not in SLOW)
NO_HANDWORK = ("eager", "compile", "reduce-overhead", "cuda graph")
