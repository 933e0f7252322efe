"""A branch as data: its structs, and the ways from fx nodes to a program and on to a function."""

from mpsrun.graph.build import build
from mpsrun.graph.data import Input, Map, Named, Op, Program, Ref, Seq
from mpsrun.graph.encode import extract
from mpsrun.graph.state import Autocast, State
from mpsrun.graph.validate import validate

__all__ = [
    "Autocast", "Input", "Map", "Named", "Op", "Program", "Ref", "Seq", "State", "build", "extract", "validate",
]  # fmt: skip
