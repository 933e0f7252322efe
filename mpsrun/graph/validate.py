"""A program from a stranger, checked before anything of it is run."""

from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from mpsrun.errors import NotShippable
from mpsrun.graph import ops, state
from mpsrun.graph.data import Map, Named, Op, Program, Ref, Seq, Slice

MAX_VALUES = 50_000
MAX_ITEMS = 500_000  # arguments of all ops together, nested ones included
MAX_ITEMS_AN_OP = 10_000
MAX_DEPTH = 8
MAX_TEXT = 1_000


def validate(program: Program) -> None:
    """Check that `program` is well-formed: known ops, references backward only, sane sizes.

    Raises ValueError for a malformed program and `NotShippable` for an op that is not on the list.
    """
    _check_types(program)
    inputs, nodes = len(program.inputs), len(program.nodes)
    if inputs + nodes > MAX_VALUES:
        raise ValueError(f"program: expected at most {MAX_VALUES} values, found {inputs + nodes}")
    items = 0
    for index, op in enumerate(program.nodes):
        items += _check_op(op, inputs + index)
        if items > MAX_ITEMS:
            raise ValueError(f"program: expected at most {MAX_ITEMS} arguments, found more")
    _check_range("output", program.outputs, inputs, inputs + nodes)
    _check_writes(program)


def constant(named: Named) -> Any:
    """The torch constant that `named` stands for; raises ValueError where there is none."""
    if named.kind == "ellipsis":
        return Ellipsis
    if named.kind == "device":
        try:
            return torch.device(named.name)
        except RuntimeError as error:
            raise ValueError(f"device: expected a name such as cuda:0, found {named.name!r}") from error
    kinds = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
    found = getattr(torch, named.name, None) if named.name.isidentifier() else None
    if not isinstance(found, kinds[named.kind]):
        raise ValueError(f"expected the name of a {named.kind} of torch, found {named.name!r}")
    return found


def _check_types(program: Program) -> None:
    """Structs made by hand are not checked by msgspec; a trip through bytes does that."""
    if not isinstance(program, Program):
        raise ValueError(f"expected a Program, found {type(program).__name__}")
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(program), type=Program)
    except (msgspec.MsgspecError, TypeError, OverflowError, RecursionError, UnicodeError) as error:
        raise ValueError(f"program: {error}") from error


def _check_op(op: Op, here: int) -> int:
    if ops.resolve(op.name) is None:
        raise NotShippable(f"{op.name[:100]!r} is not an op that can run in a worker")
    if op.state is not None:
        state.check(op.state)
    if op.name.startswith(("Tensor.", "attr.")) and not (op.args and isinstance(op.args[0], Ref)):
        raise ValueError(f"{op.name}: expected a value of the program as first argument, found {op.args[:1]}")
    if not all(key.isidentifier() and len(key) <= MAX_TEXT for key in op.kwargs):
        raise ValueError(f"{op.name}: expected names as keyword arguments, found {list(op.kwargs)[:3]}")
    if op.name.startswith(("operator.", "math.")):
        _check_python_op(op)
    return _check_args(op, here)


def _check_python_op(op: Op) -> None:
    """Sequences and texts have no place in arithmetic ([0] * 10**9); an index may be one."""
    indexed = op.name in ("operator.getitem", "operator.setitem")
    plain = op.args[:1] if indexed else op.args
    if op.kwargs or any(isinstance(arg, (str, Seq, Map, Slice)) for arg in plain):
        raise ValueError(f"{op.name}: expected values and numbers as arguments, found {plain!r:.200}")


def _check_args(op: Op, here: int) -> int:
    count = 0
    pending = [(arg, 0) for arg in (*op.args, *op.kwargs.values())]
    while pending:
        arg, depth = pending.pop()
        count += 1
        if count > MAX_ITEMS_AN_OP or depth > MAX_DEPTH:
            raise ValueError(f"{op.name}: more than {MAX_ITEMS_AN_OP} arguments or deeper than {MAX_DEPTH} levels")
        if isinstance(arg, Ref):
            _check_range(f"reference in {op.name}", [arg.value], 0, here)
        elif isinstance(arg, Named):
            constant(arg)
        elif isinstance(arg, str) and len(arg) > MAX_TEXT:
            raise ValueError(f"{op.name}: expected texts up to {MAX_TEXT} characters, found {len(arg)}")
        pending.extend((child, depth + 1) for child in _children(arg))
    return count


def _children(arg: Any) -> Iterable[Any]:
    if isinstance(arg, Seq):
        return arg.items
    if isinstance(arg, Map):
        return arg.items.values()
    if isinstance(arg, Slice):
        return (arg.start, arg.stop, arg.step)
    return ()


def _check_range(what: str, values: Iterable[int], start: int, stop: int) -> None:
    for value in values:
        if not start <= value < stop:
            raise ValueError(f"{what}: expected a value from {start} to {stop - 1}, found {value}")


def _check_writes(program: Program) -> None:
    _check_range("write", program.writes, 0, len(program.inputs))
    if len(program.hidden) != len(program.writes) or len(set(program.writes)) != len(program.writes):
        raise ValueError(f"writes: expected one flag each, found {program.writes} and {program.hidden}")
    for index in program.writes:
        if program.inputs[index].kind != "buffer":
            raise ValueError(f"write: expected a buffer, found input {index} ({program.inputs[index].kind})")
