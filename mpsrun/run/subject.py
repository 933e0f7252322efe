"""What has to be known of a graph before it is recorded."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx

from mpsrun.graph.effects import Effects
from mpsrun.run.plainrun import PlainRun


class Subject:
    """What has to be known of a graph to record it.

    statics: the arguments that are read and written where they are. evolving: those of them that it writes, and whose
    values before it has read, unlike BatchNorm's. refusal: why it cannot be recorded, if so. recorded: by whom it is,
    under sizes, modes and plans that differ.
    """

    def __init__(self, gm: fx.GraphModule, effects: Effects, kind: str) -> None:
        self.plain = PlainRun(gm, effects, kind)
        self.kind = kind
        self.is_random = any(facts.random for facts in effects.facts.values())
        self.statics = frozenset(i for i, k in enumerate(self.plain.kinds) if k in ("parameter", "buffer"))
        self.evolving = [i for i in self.plain.written if _is_read(effects, self.plain.placeholders[i])]
        self.refusal = self.plain.refusal or self._refusal(gm, effects)
        self.recorded: weakref.WeakSet[Any] = weakref.WeakSet()

    def _refusal(self, gm: fx.GraphModule, effects: Effects) -> str | None:
        facts = effects.facts
        for i in self.plain.written:
            if i not in self.statics:
                return f"it writes its input {self.plain.names[i]} in place"
        for value in effects.values.values():
            if isinstance(value, torch.Tensor) and value.device.type != self.kind:
                return f"it computes on the {value.device.type}, too"
        seen = frozenset().union(*(facts[node].outputs for node in self.plain.placeholders))
        for node in gm.graph.output_node().all_input_nodes:
            if facts[node].outputs & seen:
                return f"{node.name}, which it returns, shares memory with an argument or another result"
            seen |= facts[node].outputs
        return None


def _is_read(effects: Effects, placeholder: fx.Node) -> bool:
    """Whether what a written argument held before matters. Statistics of BatchNorm and steps counted are not read."""
    own = effects.facts[placeholder].outputs
    for node, facts in effects.facts.items():
        written = own & facts.writes
        if written and not written <= facts.hidden_writes and node.users:
            return True
        if own & facts.reads and not written:
            return True
    return False
