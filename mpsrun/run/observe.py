"""A plain run of a graph, which notes what no fake tensor knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpsrun.graph.effects import Effects
from mpsrun.graph.regions import Region
from mpsrun.run import philox
from mpsrun.run import state as modes
from mpsrun.run.layout import TensorMeta


@dataclass(frozen=True)
class Observation:
    """What one plain run of a graph showed: metas (or ints) by node, and how far each random op moved the generator."""

    metas: Mapping[fx.Node, TensorMeta | int]
    random_steps: Mapping[fx.Node, int] = field(default_factory=dict)


class Observer(fx.Interpreter):
    """A plain run that notes what the regions need to know."""

    def __init__(self, gm: fx.GraphModule, effects: Effects, regions: Sequence[Region]) -> None:
        super().__init__(gm)
        self._effects = effects
        self._needed = needed_nodes(regions)
        self._metas: dict[fx.Node, Any] = {}
        self._random: dict[fx.Node, int] = {}

    @property
    def observation(self) -> Observation:
        return Observation(self._metas, self._random)

    def run_node(self, n: fx.Node) -> Any:
        random = n.op.startswith("call") and self._effects.facts[n].random and torch.cuda.is_initialized()
        before = philox.offset() if random else 0
        result = super().run_node(n)
        if random:
            self._random[n] = philox.offset() - before
        if n in self._needed:
            meta = meta_of(result)
            if meta is not None:
                self._metas[n] = meta
        return result


def must_be_plain(kind: str) -> bool:
    """Whether somebody counts on the graph's own ops.

    Checkpointing counts on the same saved tensors in every run, transforms on ops that they can follow; a CUDA graph
    would replay one step's hand-offs.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None or modes.transformed():
        return True
    return kind == "cuda" and torch.cuda.is_current_stream_capturing()


def needed_nodes(regions: Sequence[Region]) -> set[fx.Node]:
    """The nodes whose metas a plain run must note for these regions to be cut."""
    return {n for r in regions for b in r.branches for n in (*b.inputs, *b.outputs)}


def meta_of(value: Any) -> TensorMeta | int | None:
    """What an Observation keeps of a value."""
    if isinstance(value, torch.Tensor):
        return TensorMeta.of(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
