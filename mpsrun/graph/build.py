"""A program as a function: an fx graph over the named ops, compiled to Python once."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx

from mpsrun.graph import ops
from mpsrun.graph.data import Arg, Complex, Map, Named, Op, Program, Ref, Seq, Slice
from mpsrun.graph.state import State, applied
from mpsrun.graph.validate import constant

Seek = Callable[[int], None]


def build(
    program: Program, device: torch.device | str | None = None, seek: Seek | None = None
) -> Callable[..., tuple[Any, ...]]:
    """A function of the program's inputs that returns its outputs as a tuple.

    `device` replaces every device named in the program; `seek(i)` is called before the i-th random op. Call
    `validate` first where the program comes from a socket.
    """
    return _Builder(program, torch.device(device) if device is not None else None, seek).function()


class _Builder:
    def __init__(self, program: Program, device: torch.device | None, seek: Seek | None) -> None:
        self.program = program
        self.device = device
        self.seek = seek
        self.first = len(program.inputs)  # the number of the first node
        self.randoms = 0

    def function(self) -> Callable[..., tuple[Any, ...]]:
        graph = fx.Graph()
        values = {index: graph.placeholder(f"input_{index}") for index in range(self.first)}
        numbered = enumerate(self.program.nodes, start=self.first)
        for state, run in groupby(numbered, key=lambda item: item[1].state):
            ops_of_run = list(run)
            if state is None:
                self._add(graph, values, ops_of_run)
            else:
                self._add_bracket(graph, values, ops_of_run, state)
        graph.output(tuple(values[index] for index in self.program.outputs))
        return fx.GraphModule(torch.nn.Module(), graph).forward

    def _add(self, graph: fx.Graph, values: dict[int, fx.Node], numbered: Sequence[tuple[int, Op]]) -> None:
        for index, op in numbered:
            if op.random:
                self._add_seek(graph)
            args = tuple(self._decode(arg, values) for arg in op.args)
            kwargs = {key: self._decode(arg, values) for key, arg in op.kwargs.items()}
            values[index] = self._call(graph, op.name, args, kwargs)

    def _add_seek(self, graph: fx.Graph) -> None:
        if self.seek is not None:
            graph.call_function(_named(self.seek, "seek"), (self.randoms,))
        self.randoms += 1

    def _add_bracket(
        self, graph: fx.Graph, values: dict[int, fx.Node], numbered: Sequence[tuple[int, Op]], state: State
    ) -> None:
        """Ops in a row under one state become one call, whose body runs inside the bracket."""
        inner = fx.Graph()
        taken = sorted({ref for _, op in numbered for ref in _refs(op) if ref in values})
        inner_values = {index: inner.placeholder(f"value_{index}") for index in taken}
        self._add(inner, inner_values, numbered)
        made = [index for index, _ in numbered]
        inner.output(tuple(inner_values[index] for index in made))
        body = fx.GraphModule(torch.nn.Module(), inner).forward
        call = graph.call_function(_bracketed(body, state), tuple(values[index] for index in taken))
        for place, index in enumerate(made):
            values[index] = graph.call_function(_item, (call, place))

    @staticmethod
    def _call(graph: fx.Graph, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if name.startswith("Tensor."):
            return graph.call_method(name.removeprefix("Tensor."), args, kwargs)
        target = ops.resolve(name)
        if target is None:
            raise ValueError(f"expected an op on the list, found {name!r}")
        if name.startswith("attr."):
            return graph.call_function(getattr, (*args, name.removeprefix("attr.")))
        return graph.call_function(target, args, kwargs)

    def _decode(self, arg: Arg, values: dict[int, fx.Node]) -> Any:
        if isinstance(arg, Ref):
            return values[arg.value]
        if isinstance(arg, Seq):
            items = [self._decode(item, values) for item in arg.items]
            return items if arg.kind == "list" else tuple(items)
        if isinstance(arg, Map):
            return {key: self._decode(item, values) for key, item in arg.items.items()}
        if isinstance(arg, Slice):
            return slice(*(self._decode(part, values) for part in (arg.start, arg.stop, arg.step)))
        if isinstance(arg, Complex):
            return complex(arg.real, arg.imag)
        if isinstance(arg, Named):
            return self.device if arg.kind == "device" and self.device is not None else constant(arg)
        return arg


def _item(values: tuple[Any, ...], place: int) -> Any:
    return values[place]


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Fx writes calls by the function's name, which bound methods and partials do not have."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return call


def _bracketed(body: Callable[..., Any], state: State) -> Callable[..., Any]:
    def bracket(*args: Any) -> Any:
        with applied(state):
            return body(*args)

    return bracket


def _refs(op: Op) -> set[int]:
    found: set[int] = set()
    pending: list[Any] = [*op.args, *op.kwargs.values()]
    while pending:
        arg = pending.pop()
        if isinstance(arg, Ref):
            found.add(arg.value)
        elif isinstance(arg, Seq):
            pending.extend(arg.items)
        elif isinstance(arg, Map):
            pending.extend(arg.items.values())
        elif isinstance(arg, Slice):
            pending.extend((arg.start, arg.stop, arg.step))
    return found
