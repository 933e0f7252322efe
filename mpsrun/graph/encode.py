"""Nodes of an fx graph written as a `Program`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mpsrun.errors import NotShippable
from mpsrun.graph import ops, state
from mpsrun.graph.data import Arg, Complex, Input, Map, Named, Op, Program, Ref, Seq, Slice
from mpsrun.graph.facts import Effects

INT_BITS = 63


def extract(nodes: Iterable[fx.Node], effects: Effects, outputs: Sequence[fx.Node]) -> tuple[Program, list[fx.Node]]:
    """Write `nodes` as a program that hands out the values of `outputs`.

    The second result is the nodes outside that are the program's inputs, in the order of `Program.inputs`.
    Raises `NotShippable` with the reason where a node cannot be written as data.
    """
    inside = sorted((node for node in nodes if node.op != "get_attr"), key=effects.order.__getitem__)
    outside = _outside(inside)
    number = {node: index for index, node in enumerate([*outside, *inside])}
    inputs = [_input(node, effects) for node in outside]
    encoded = [_op(node, number, effects) for node in inside]
    for node in outputs:
        _check_output(node, number, len(inputs))
    writes = _writes(inside, outside, inputs, effects)
    program = Program(inputs, encoded, [number[node] for node in outputs], list(writes), list(writes.values()))
    return program, outside


def encodable(node: fx.Node) -> str | None:
    """Why a call cannot be written as data, or None where it can."""
    numbers = dict.fromkeys(node.all_input_nodes, 0)
    try:
        _call(node, numbers)
    except NotShippable as reason:
        return str(reason)
    return None


def _outside(inside: Sequence[fx.Node]) -> list[fx.Node]:
    known = set(inside)
    found: dict[fx.Node, None] = {}
    for node in inside:
        found.update(dict.fromkeys(source for source in node.all_input_nodes if source not in known))
    return list(found)


def _input(node: fx.Node, effects: Effects) -> Input:
    value = node.meta.get("example_value")
    kind = effects.placeholder_kind.get(node)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return Input("int")
    if isinstance(value, torch.Tensor) or node.op == "get_attr":
        if kind == "parameter":
            return Input("parameter")
        return Input("buffer" if kind == "buffer" else "tensor")
    name = next((source.name for source in node.all_input_nodes), node.name)  # of a number, where it comes from
    if isinstance(value, float | torch.SymFloat):
        raise NotShippable(f"reads {name}, a float that changes from call to call; pass it as a tensor")
    raise NotShippable(f"takes a {type(value).__name__} from outside ({name}); only tensors and whole numbers travel")


def _op(node: fx.Node, number: Mapping[fx.Node, int], effects: Effects) -> Op:
    facts = effects.facts[node]
    if facts.is_state:
        raise NotShippable(f"{node.name} changes the mode that later ops run under")
    name, args, kwargs = _call(node, number)
    if facts.state is not None:
        try:
            state.check(facts.state)
        except ValueError as error:
            raise NotShippable(str(error)) from error
    return Op(name, args, kwargs, facts.state, facts.random)


def _call(node: fx.Node, number: Mapping[fx.Node, int]) -> tuple[str, list[Arg], dict[str, Arg]]:
    name = ops.name_of(node.op, node.target, node.args)
    if name is None:
        raise NotShippable(f"{ops.describe(node.target)} is not an op that can run in a worker")
    positional = node.args[:1] if name.startswith("attr.") else node.args
    args = [encode(arg, number) for arg in positional]
    kwargs = {key: encode(_device(key, arg), number) for key, arg in node.kwargs.items()}
    return name, args, kwargs


def _device(key: str, arg: Any) -> Any:
    return torch.device(arg) if key == "device" and isinstance(arg, str) else arg


def encode(arg: Any, number: Mapping[fx.Node, int]) -> Arg:
    """One argument of a call as data; raises `NotShippable` for what has no such form."""
    if arg is None or isinstance(arg, (bool, float, str)):
        return arg
    if isinstance(arg, fx.Node):
        return Ref(number[arg])
    if isinstance(arg, int):
        if arg.bit_length() > INT_BITS:
            raise NotShippable(f"the whole number {arg} has more than {INT_BITS} bits")
        return arg
    if isinstance(arg, (list, tuple)):
        items = [encode(item, number) for item in arg]
        return Seq("list" if isinstance(arg, list) else "tuple", items)
    if isinstance(arg, Mapping) and all(isinstance(key, str) for key in arg):
        return Map({key: encode(item, number) for key, item in arg.items()})
    if isinstance(arg, slice):
        return Slice(encode(arg.start, number), encode(arg.stop, number), encode(arg.step, number))
    return _constant(arg)


def _constant(arg: Any) -> Arg:
    if isinstance(arg, complex):
        return Complex(arg.real, arg.imag)
    if arg is Ellipsis:
        return Named("ellipsis", "...")
    if isinstance(arg, torch.device):
        return Named("device", str(arg))
    if isinstance(arg, torch.dtype):
        return Named("dtype", _name(arg))
    if isinstance(arg, torch.layout):
        return Named("layout", _name(arg))
    if isinstance(arg, torch.memory_format):
        return Named("memory_format", _name(arg))
    raise NotShippable(f"takes an argument of type {type(arg).__name__}, which has no form as data")


def _name(constant: Any) -> str:
    return str(constant).removeprefix("torch.")


def _check_output(node: fx.Node, number: Mapping[fx.Node, int], inputs: int) -> None:
    if number.get(node, -1) < inputs:
        raise ValueError(f"expected outputs of the branch itself, found {node.name}, which is outside it")
    value = node.meta.get("example_value")
    if value is not None and not isinstance(value, torch.Tensor):
        raise NotShippable(f"hands out a {type(value).__name__} ({node.name}); only tensors travel back")


def _writes(
    inside: Sequence[fx.Node], outside: Sequence[fx.Node], inputs: Sequence[Input], effects: Effects
) -> dict[int, bool]:
    """Inputs written in place, and whether each of the writes to it is hidden."""
    owner = {storage: index for index, node in enumerate(outside) for storage in effects.facts[node].outputs}
    found: dict[int, bool] = {}
    for node in inside:
        facts = effects.facts[node]
        for storage in sorted(facts.writes & owner.keys()):
            index = owner[storage]
            if inputs[index].kind != "buffer":
                raise NotShippable(f"writes {outside[index].name}, which belongs to the lead, in place")
            found[index] = found.get(index, True) and storage in facts.hidden_writes
    return found
