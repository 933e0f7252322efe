"""What has to be known of a graph before it is recorded."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mpsrun.graph.effects import Effects
from mpsrun.graph.facts import NodeFacts
from mpsrun.graph.state import State
from mpsrun.run.layout import Gradients, follow_gradients
from mpsrun.run.plainrun import PlainRun
from mpsrun.wire.messages import Flags

MOST_KNOWN = 16  # sizes, flags and modes


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
        touching = _touching(effects)
        own = {i: effects.facts[self.plain.placeholders[i]].outputs for i in self.plain.written}
        self.evolving = [i for i in self.plain.written if _is_read(own[i], touching)]
        self.refusal = self.plain.refusal or self._refusal(gm, effects)
        self.recorded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known: dict[tuple[Any, ...], Gradients] = {}

    def gradients(self, inputs: tuple[Any, ...], flags: Flags, state: State) -> Gradients:
        """What autograd does with it, whatever the plan; flags and state are those of the calling thread.

        inputs: its arguments, with metas in the place of tensors. Each plan and each recording asks, and to find out
        takes half a second for 1500 ops.
        """
        key = inputs, flags, state
        found = self._known.get(key)
        if found is None:
            found = follow_gradients(self._tensors, inputs, state)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def _tensors(self, *args: Any) -> list[torch.Tensor]:
        return [value for value in self.plain.forward(*args) if isinstance(value, torch.Tensor)]

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


def _touching(effects: Effects) -> Mapping[int, Sequence[tuple[fx.Node, NodeFacts]]]:
    """By memory, the nodes that read or write it."""
    found: defaultdict[int, list[tuple[fx.Node, NodeFacts]]] = defaultdict(list)
    for node, facts in effects.facts.items():
        for memory in facts.reads | facts.writes:
            found[memory].append((node, facts))
    return found


def _is_read(own: frozenset[int], touching: Mapping[int, Sequence[tuple[fx.Node, NodeFacts]]]) -> bool:
    """Whether what an argument's memory held before matters. Statistics of BatchNorm and steps counted are not read."""
    for node, facts in (touch for memory in own for touch in touching.get(memory, ())):
        written = own & facts.writes
        if written and not written <= facts.hidden_writes and node.users:
            return True
        if own & facts.reads and not written:
            return True
    return False
