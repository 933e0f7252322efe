"""Branches through Inductor: the function of a program as compiled code, with its backward, for one set of tensors.

Inductor is called by itself, without Dynamo: a program is a graph already, and nothing must be compiled in a step. What
Dynamo's guards would look at is compared in each call, and where something is not as it was the plain function runs.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mpsrun.errors import in_a_line
from mpsrun.run import state as modes

Function = Callable[..., Sequence[torch.Tensor]]
MOST_CHARACTERS = 200  # of a reason


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Inductor as it has to be: under this a function is compiled and called for the first time.

    No CUDA graphs, which are somebody else's; no processes of its own, which nobody would end. That backward may come
    twice, so that its buffers are not given away, is read in each backward again: it is set for good, in a process
    that is a worker.
    """
    import torch._functorch.config as aot
    import torch._inductor.config as inductor

    aot.donated_buffer = False
    with inductor.patch({"compile_threads": 1, "triton.cudagraphs": False}):
        yield


def compiled(function: Function, values: Sequence[Any], outputs: int, kind: str) -> Function:
    """Compile a function of tensors and numbers, under the modes that are set, for what is like `values`.

    outputs: how many tensors it returns. kind: of device. Raises whatever Inductor does.
    """
    from torch._inductor.compile_fx import compile_fx

    tensors = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    numbers = [None if isinstance(value, torch.Tensor) else value for value in values]

    def program(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        arguments = list(numbers)
        for i, tensor in zip(tensors, given, strict=True):
            arguments[i] = tensor
        return function(*arguments)

    examples = [values[i] for i in tensors]
    known, ambient = _metas(examples), modes.ambient(kind)
    code: Any = compile_fx(_graph(program, len(tensors), outputs), examples)

    def call(*arguments: Any) -> Sequence[torch.Tensor]:
        given = [arguments[i] for i in tensors]
        if _metas(given) != known or modes.ambient(kind) != ambient:
            return function(*arguments)
        results: Sequence[torch.Tensor] = code(*given)
        return results

    return call


def reason(error: Exception) -> str:
    """What an error of the compiler says, in one line."""
    return in_a_line(error)[:MOST_CHARACTERS]


def _graph(program: Function, inputs: int, outputs: int) -> fx.GraphModule:
    graph = fx.Graph()
    given = tuple(graph.placeholder(f"input_{i}") for i in range(inputs))
    results = graph.call_function(program, given)
    graph.output(tuple(graph.call_function(operator.getitem, (results, i)) for i in range(outputs)))
    return fx.GraphModule(torch.nn.Module(), graph)


def _metas(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad) for tensor in tensors]
