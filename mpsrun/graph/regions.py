"""Fork-join regions: sets of branches that need nothing from each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mpsrun.graph import safety
from mpsrun.graph.facts import Effects
from mpsrun.graph.forks import Fork, find_forks
from mpsrun.graph.order import Order
from mpsrun.graph.placement import Placement
from mpsrun.graph.structure import structure_of
from mpsrun.graph.watch import size_bytes, tensors


@dataclass(frozen=True)
class Branch:
    """Ops between a fork and its join, in program order; `pinned` says why they must run in the lead.

    `inputs` are the outside nodes that it reads, `outputs` its nodes whose values are used outside;
    `bytes_in` and `bytes_out` count the activations that cross to a worker and back.
    """

    nodes: tuple[fx.Node, ...]
    pinned: str | None = None
    flops: int = 0
    bytes: int = 0
    kernels: int = 0
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True)
class Region:
    """A fork, its branches and its join; `parent` is (region index, branch index) of the enclosing branch."""

    index: int
    branches: tuple[Branch, ...]
    parent: tuple[int, int] | None = None
    where: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A fork that cannot become a region, and why, in words for the user."""

    reason: str
    where: str | None = None


@dataclass(frozen=True)
class Regions:
    """All regions of a graph, parents before children, and the forks that were refused."""

    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]


def find_regions(gm: fx.GraphModule, effects: Effects) -> Regions:
    """Every fork of `gm` whose branches are independent and of which at least one may leave the lead."""
    finder = _Finder(gm, effects)
    finder.visit(find_forks(finder.structure), None)
    return Regions(tuple(finder.regions), tuple(finder.refusals))


def whole(gm: fx.GraphModule, effects: Effects) -> Branch:
    """All of `gm` as one branch."""
    nodes = {node for node in gm.graph.nodes if node.op.startswith("call") and not effects.facts[node].is_state}
    if not nodes:
        return Branch((), pinned="it has no ops")
    return _Finder(gm, effects).branch(nodes, safety.device_of([nodes], effects))


class _Finder:
    def __init__(self, gm: fx.GraphModule, effects: Effects) -> None:
        self.effects = effects
        self.structure = structure_of(gm, effects)
        program = list(effects.order)
        self.order = Order(program, {node: effects.deps[node] | effects.random_order[node] for node in program})
        self.placement = Placement(self.structure, effects, Order(program, effects.deps))
        self.regions: list[Region] = []
        self.refusals: list[Refusal] = []

    def visit(self, forks: Sequence[Fork], parent: tuple[int, int] | None) -> None:
        for fork in forks:
            index, homes = self._judge(fork, parent)
            for part, inner in enumerate(fork.inner):
                self.visit(inner, parent if index is None else (index, homes[part]))

    def _judge(self, fork: Fork, parent: tuple[int, int] | None) -> tuple[int | None, list[int]]:
        """Add the fork's region, or its refusal; the list says which branch each part went into."""
        parts = self.placement.branches(fork.branches)
        branches, homes, reason = self._unite(parts)
        if len(branches) < 2:
            return self._refuse(parts, reason or "its branches depend on each other")
        reason = safety.detour(branches, self.order, self.effects)
        if reason is not None:
            return self._refuse(parts, reason)
        device = safety.device_of(branches, self.effects)
        made = tuple(self.branch(nodes, device) for nodes in branches)
        if all(branch.pinned for branch in made):
            return self._refuse(parts, f"no branch can leave the lead: {made[0].pinned}")
        index = len(self.regions)
        self.regions.append(Region(index, made, parent, self._where(parts)))
        return index, homes

    def _unite(self, parts: Sequence[set[fx.Node]]) -> tuple[list[set[fx.Node]], list[int], str | None]:
        """Join parts that must wait for each other into one branch."""
        homes = list(range(len(parts)))
        reason: str | None = None
        for first in range(len(parts)):
            for second in range(first + 1, len(parts)):
                found = safety.conflict(parts[first], parts[second], self.effects)
                if found is not None:
                    reason = reason or found
                    keep, gone = sorted((homes[first], homes[second]))
                    homes = [keep if home == gone else home for home in homes]
        kept = sorted(set(homes))
        branches = [set().union(*(parts[i] for i, home in enumerate(homes) if home == at)) for at in kept]
        return branches, [kept.index(home) for home in homes], reason

    def _refuse(self, parts: Sequence[set[fx.Node]], reason: str) -> tuple[None, list[int]]:
        self.refusals.append(Refusal(reason, self._where(parts)))
        return None, []

    def _where(self, parts: Sequence[set[fx.Node]]) -> str | None:
        nodes = sorted(set().union(*parts), key=self.effects.order.__getitem__)
        return next((found for node in nodes if (found := self.effects.where(node))), None)

    def branch(self, nodes: set[fx.Node], device: torch.device | None) -> Branch:
        effects = self.effects
        ordered = tuple(sorted(nodes, key=effects.order.__getitem__))
        facts = [effects.facts[node] for node in ordered]
        inputs, outputs = safety.inputs_of(nodes, effects), safety.outputs_of(nodes, effects)
        crossing = [node for node in inputs if effects.placeholder_kind.get(node) not in ("parameter", "buffer")]
        return Branch(
            nodes=ordered,
            pinned=safety.pinned(nodes, device, effects),
            flops=sum(fact.flops for fact in facts),
            bytes=sum(fact.bytes_moved for fact in facts),
            kernels=sum(fact.kernels for fact in facts),
            inputs=inputs,
            outputs=outputs,
            bytes_in=self._bytes(crossing),
            bytes_out=self._bytes(outputs),
        )

    def _bytes(self, nodes: Sequence[fx.Node]) -> int:
        return sum(size_bytes(tensor) for node in nodes for tensor in tensors(self.effects.values.get(node)))
