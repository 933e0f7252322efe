"""Where a partial order forks: cut points, components between them, and levels where there are neither.

stem - p0 -+- a1 - a2 -+- p1 - head       p0 and p1 are comparable to every unit: cut points.
           +- b1 ------+                  Between them lie two components: a fork of two branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import fx

from mpsrun.graph.order import Order
from mpsrun.graph.structure import Structure

Units = frozenset[fx.Node]
Key = TypeVar("Key")


@dataclass
class Fork:
    """Independent sets of units; `inner[i]` are the forks inside `branches[i]`."""

    branches: list[Units]
    inner: list[list["Fork"]] = field(default_factory=list)


def find_forks(structure: Structure) -> list[Fork]:
    """The forks of a whole graph, in program order, nested ones inside their branches."""
    return _decompose(frozenset(structure.units), structure)


def _decompose(units: Units, structure: Structure) -> list[Fork]:
    forks: list[Fork] = []
    for body in _bodies(units, structure):
        parts = _components(body, structure)
        if len(parts) < 2:
            if len(body) > 1:
                forks.extend(_levels(body, structure))
            continue
        forks.append(_fork(parts, structure))
    return forks


def _fork(parts: Sequence[Units], structure: Structure) -> Fork:
    fork = Fork([])
    for part in parts:
        forks = _decompose(part, structure) if len(part) > 1 else []
        if len(forks) == 1 and _is_fork_and_joins(part, forks[0], structure):
            fork.branches.extend(forks[0].branches)
            fork.inner.extend(forks[0].inner)
        else:
            fork.branches.append(part)
            fork.inner.append(forks)
    return fork


def _is_fork_and_joins(part: Units, fork: Fork, structure: Structure) -> bool:
    """Whether a branch is little more than a fork: ((a + b) + c) + d has four branches, not two of two."""
    inside = frozenset[fx.Node]().union(*fork.branches)
    rest = part - inside
    whole = not structure.order.detours(structure.order.mask(inside))
    return whole and rest <= structure.light and len(rest) <= len(fork.branches)


def _bodies(units: Units, structure: Structure) -> list[Units]:
    """What lies between cut points: units that are comparable to all others."""
    order = structure.order
    everything = order.mask(units)
    cuts, rest = 0, []
    for unit in order.members(everything):
        comparable = order.above[unit] | order.below[unit] | order.bit[unit]
        if everything & ~comparable:
            rest.append(unit)
        else:
            cuts |= order.bit[unit]
    bodies: dict[int, list[fx.Node]] = {}
    for unit in rest:
        bodies.setdefault((order.above[unit] & cuts).bit_count(), []).append(unit)
    return [frozenset(body) for _, body in sorted(bodies.items())]


def _components(units: Units, structure: Structure) -> list[Units]:
    """Weakly connected components, in program order."""
    leader = {unit: unit for unit in units}

    def find(unit: fx.Node) -> fx.Node:
        while leader[unit] is not unit:
            leader[unit] = leader[leader[unit]]
            unit = leader[unit]
        return unit

    for unit in units:
        for source in structure.before[unit] & units:
            leader[find(unit)] = find(source)
    parts: dict[fx.Node, set[fx.Node]] = {}
    for unit in structure.order.members(structure.order.mask(units)):
        parts.setdefault(find(unit), set()).add(unit)
    return [frozenset(part) for part in parts.values()]


def _levels(units: Units, structure: Structure) -> list[Fork]:
    """A body without cut points, as layers of super-nodes: HRNet's fuse layers, NASNet's cells."""
    blocks = _Blocks(units, structure)
    blocks.contract()
    blocks.gather(structure.light)
    if len(blocks.members) < 2:
        return []
    forks: list[Fork] = []
    for level in blocks.levels():
        if len(level) > 1:
            forks.append(_fork(level, structure))
        else:
            forks.extend(_decompose(level[0], structure))
    return forks


class _Blocks:
    """The transitive reduction of a body, which series chains and diamonds are contracted in."""

    def __init__(self, units: Units, structure: Structure) -> None:
        self.order: Order[fx.Node] = structure.order
        inside = self.order.mask(units)
        self.members: dict[fx.Node, set[fx.Node]] = {unit: {unit} for unit in self.order.members(inside)}
        self.before: dict[fx.Node, set[fx.Node]] = {unit: set() for unit in self.members}
        self.after: dict[fx.Node, set[fx.Node]] = {unit: set() for unit in self.members}
        for unit in self.members:
            direct = self.order.mask(structure.before[unit] & units)
            implied = self.order.above_all(direct)
            for source in self.order.members(direct & ~implied):
                self.before[unit].add(source)
                self.after[source].add(unit)

    def contract(self) -> None:
        """Merge series chains, and parallel blocks between the same two, until nothing changes."""
        pending = dict.fromkeys(self.members)
        while pending:
            block, _ = pending.popitem()
            if block not in self.members:
                continue
            merged = self._merge_series(block) or self._merge_parallel(block)
            if merged is not None:
                pending.update(dict.fromkeys((merged, *self.before[merged], *self.after[merged])))

    def gather(self, light: Units) -> None:
        """Merge light joins with what only they need: a long sum is one block, not a level for each of its terms.

        Not where the depth of something would grow. Forks among the terms are then found inside the block.
        """
        depth: dict[fx.Node, int] = {}
        for block in self.depths():  # sources first
            last = max((depth[source] for source in self.before[block]), default=-1)
            feeding = [source for source in self.before[block] if depth[source] == last]
            depth[block] = last + 1
            if feeding and self.members[block] <= light and all(self.after[source] == {block} for source in feeding):
                depth[block] = last
                for source in feeding:
                    self._take_in(block, source)

    def depths(self) -> dict[fx.Node, int]:
        """By block, the longest path from a source."""
        depth: dict[fx.Node, int] = {}
        waiting = {block: len(sources) for block, sources in self.before.items()}
        ready = [block for block, count in waiting.items() if count == 0]
        for block in ready:  # grows while it is walked
            depth[block] = max((depth[source] + 1 for source in self.before[block]), default=0)
            for target in self.after[block]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    ready.append(target)
        return depth

    def levels(self) -> list[list[Units]]:
        """Blocks by their depth."""
        depth = self.depths()
        found: dict[int, list[Units]] = {}
        for block in sorted(depth, key=self._first):
            found.setdefault(depth[block], []).append(frozenset(self.members[block]))
        return [level for _, level in sorted(found.items())]

    def _first(self, block: fx.Node) -> int:
        """Where in the program a block starts."""
        return min(self.order.bit[unit] for unit in self.members[block])

    def _take_in(self, block: fx.Node, source: fx.Node) -> None:
        """Make what only this block needs a part of it."""
        self.before[block].remove(source)
        for earlier in self.before[source]:
            self.after[earlier].remove(source)
            self.after[earlier].add(block)
        self.before[block] |= self.before.pop(source)
        del self.after[source]
        self.members[block] |= self.members.pop(source)

    def _merge_series(self, block: fx.Node) -> fx.Node | None:
        if len(self.after[block]) != 1:
            return None
        (target,) = self.after[block]
        if len(self.before[target]) != 1:
            return None
        self.after[block] = self.after.pop(target)
        del self.before[target]
        for later in self.after[block]:
            self.before[later].remove(target)
            self.before[later].add(block)
        self.members[block] |= self.members.pop(target)
        return block

    def _merge_parallel(self, block: fx.Node) -> fx.Node | None:
        if len(self.before[block]) != 1 or len(self.after[block]) != 1:
            return None
        (source,), (target,) = self.before[block], self.after[block]
        for twin in self.after[source] & self.before[target] - {block}:
            if self.before[twin] == {source} and self.after[twin] == {target}:
                self.after[source].remove(twin)
                self.before[target].remove(twin)
                del self.before[twin], self.after[twin]
                self.members[block] |= self.members.pop(twin)
                return block
        return None
