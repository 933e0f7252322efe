"""What regions and branches are called in a report: the paths of the user's modules, else the user's lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from mpsrun.graph.facts import line_of

if TYPE_CHECKING:
    from mpsrun.graph.regions import Branch, Region

Path = tuple[str, ...]

# Dynamo writes a module's path as the Python expression that leads to it: L['self'].features[0], or with getattr.
_ROOT = re.compile(r"[LG]\['\w+'\]")
_WORD = re.compile(r"\w+")
_OF_MODULES = frozenset({"_modules", "_parameters", "_buffers"})
_NOT_IN_PATH = _OF_MODULES | {"getattr"}


@dataclass(frozen=True)
class RegionName:
    """`kind` is the class of the module around a region, `path` its name in the network; either may be empty."""

    kind: str
    path: str


def network(gm: fx.GraphModule) -> str:
    """The class of the module that is the whole network; empty where Dynamo did not note it."""
    stacks = filter(None, map(_modules, gm.graph.nodes))
    return next((kind for ((path, kind), *_) in stacks if not path), "")


def region(region: Region) -> RegionName:
    """The innermost module that all branches are in; without one, the user's line."""
    path = _shared([_path(branch) for branch in region.branches])
    if not path:
        return RegionName("", _place(region.where or "the network"))
    for node in region.branches[0].nodes:
        for found, kind in _modules(node):
            if found == path:
                return RegionName(kind, ".".join(path))
    return RegionName("", ".".join(path))


def branches(region: Region) -> tuple[str, ...]:
    """By branch, its module below the module of the region; where that does not tell them apart, op and line."""
    paths = [_path(branch) for branch in region.branches]
    above = len(_shared(paths))
    labels = [".".join(path[above:]) for path in paths]
    return tuple(
        label if label and labels.count(label) == 1 else _first_op(branch)
        for label, branch in zip(labels, region.branches, strict=True)
    )


def fold(alike: Sequence[RegionName]) -> tuple[str, str]:
    """One name, in two lines, for regions of the same kind."""
    first, last = alike[0], alike[-1]
    if len(alike) == 1:
        return (first.kind, first.path) if first.kind else (first.path, "")
    return f"{len(alike)} x {first.kind or 'region'}", f"{first.path} to {last.path}"


def argument(node: fx.Node) -> str:
    """The name of a graph's input in the network: "paths.0.weight", or the user's own "batch.images"."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    expression = source.name() if callable(source.name) else source.name
    words = _WORD.findall(expression)[1:]  # without L or G, for local and global
    return ".".join(words if _OF_MODULES.isdisjoint(words) else _words(expression))


def _path(branch: Branch) -> Path:
    """The innermost module that all nodes of a branch are in."""
    return _shared([modules[-1][0] for node in branch.nodes if (modules := _modules(node))])


def _modules(node: fx.Node) -> list[tuple[Path, str]]:
    """The modules a node is in, the outermost first: path and class name."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [(_words(path), getattr(kind, "__name__", str(kind))) for path, kind in stack]


def _words(expression: str) -> Path:
    return tuple(word for word in _WORD.findall(_ROOT.sub("", expression)) if word not in _NOT_IN_PATH)


def _shared(paths: Sequence[Path]) -> Path:
    """The longest common beginning."""
    if not paths:
        return ()
    low, high = min(paths), max(paths)
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:count]


def _first_op(branch: Branch) -> str:
    node = branch.nodes[0]
    line = line_of(node)
    return f"{node.name} ({_place(line)})" if line else node.name


def _place(where: str) -> str:
    """The file and line of "train.py:12: y = f(x)"."""
    return ":".join(where.split(":")[:2])
