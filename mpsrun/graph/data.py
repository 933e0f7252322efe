"""The structs of a program: numbered values, ops by name, and nothing that could carry code."""

from typing import Literal, TypeAlias, Union

import msgspec

from mpsrun.graph.state import State


class Ref(msgspec.Struct, frozen=True, array_like=True, tag="ref"):
    """A value of the program: inputs are numbered first, then nodes in order."""

    value: int


class Complex(msgspec.Struct, frozen=True, array_like=True, tag="complex"):
    """A complex number."""

    real: float
    imag: float


class Named(msgspec.Struct, frozen=True, array_like=True, tag="named"):
    """One of torch's constants by its name: `torch.float32` is ("dtype", "float32")."""

    kind: Literal["dtype", "device", "layout", "memory_format", "ellipsis"]
    name: str


class Slice(msgspec.Struct, frozen=True, array_like=True, tag="slice"):
    """An index with a colon."""

    start: "Arg"
    stop: "Arg"
    step: "Arg"


class Seq(msgspec.Struct, frozen=True, array_like=True, tag="seq"):
    """A list or a tuple."""

    kind: Literal["list", "tuple"]
    items: list["Arg"]


class Map(msgspec.Struct, frozen=True, array_like=True, tag="map"):
    """A dict with names as keys."""

    items: dict[str, "Arg"]


Arg: TypeAlias = Union[bool, int, float, str, Ref, Complex, Named, Slice, Seq, Map, None]  # noqa: UP007


class Input(msgspec.Struct, frozen=True):
    """What a program is called with: a tensor of this kind, or an int."""

    kind: Literal["parameter", "buffer", "tensor", "int"]


class Op(msgspec.Struct, frozen=True):
    """One call; `name` stands in graph/ops.py, `state` is None where it runs as the program is entered."""

    name: str
    args: list[Arg]
    kwargs: dict[str, Arg] = {}
    state: State | None = None
    random: bool = False


class Program(msgspec.Struct, frozen=True):
    """A branch, or several.

    `outputs` are values handed out; `writes` are inputs (buffers) written in place, and `hidden[i]` tells
    that the write to `writes[i]` bumps no version counter in eager PyTorch.
    """

    inputs: list[Input]
    nodes: list[Op]
    outputs: list[int]
    writes: list[int] = []
    hidden: list[bool] = []
