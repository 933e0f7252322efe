"""What is known of each node of a graph, and of the order between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from mpsrun.graph.state import State


@dataclass(frozen=True)
class NodeFacts:
    """What one node does; storages are small ints of this graph alone."""

    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    hidden_writes: frozenset[int] = frozenset()  # the writes that bump no version counter in eager PyTorch
    outputs: frozenset[int] = frozenset()  # storages of the node's value; views share the storage of their base
    state: State | None = None  # None: as the graph is entered
    is_state: bool = False  # the node changes the state and does nothing else
    random: bool = False
    sync: bool = False  # its result depends on data, so the CPU waits for the device
    opaque: str | None = None  # why it cannot leave the lead
    unknown: bool = False  # what it does beyond its tensors is not known
    barrier: bool = False  # sets a mode that is not followed: nothing may pass it
    flops: int = 0
    bytes_moved: int = 0
    kernels: int = 0
    floating: bool = False  # needs parameters, buffers and constants only, no activation
    device: torch.device | None = None


@dataclass(frozen=True)
class Effects:
    """The facts of every node and the order that they force.

    `deps[node]` are the nodes that must run before it: those whose values it takes, and those whose reads and
    writes of the same memory come before its own. `random_order` has the same for the order of random draws.
    `placeholder_kind` is one of "parameter", "buffer", "input", "constant", "symint"; `order` is program
    order.
    """

    facts: Mapping[fx.Node, NodeFacts]
    deps: Mapping[fx.Node, set[fx.Node]]
    random_order: Mapping[fx.Node, set[fx.Node]]
    placeholder_kind: Mapping[fx.Node, str]
    order: Mapping[fx.Node, int]
    values: Mapping[fx.Node, object] = field(default_factory=dict)  # fake results, for shapes and dtypes

    def where(self, node: fx.Node) -> str | None:
        """The user's line behind `node`, as "file.py:12: code", if Dynamo recorded it."""
        return line_of(node)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n\s*(?P<code>.*)')


def line_of(node: fx.Node) -> str | None:
    """The innermost line of the user's own code in a node's stack trace."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [frame for frame in frames if "/torch/" not in frame["file"]]
    if not frames:
        return None
    frame = (own or frames)[-1]
    return f"{frame['file'].rsplit('/', 1)[-1]}:{frame['line']}: {frame['code'].strip()}"
