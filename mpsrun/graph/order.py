"""Reachability in a graph, as one bit set a node."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Order(Generic[Item]):
    """The partial order that edges generate; `items` must list predecessors before successors."""

    def __init__(self, items: Sequence[Item], before: Mapping[Item, Iterable[Item]]) -> None:
        self.items = list(items)
        self.bit = {item: 1 << index for index, item in enumerate(self.items)}
        self.above: dict[Item, int] = {}  # everything that must come first
        for item in self.items:
            found = 0
            for other in before.get(item, ()):
                if other in self.above:
                    found |= self.above[other] | self.bit[other]
            self.above[item] = found
        self.below: dict[Item, int] = dict.fromkeys(self.items, 0)
        for item in reversed(self.items):
            reach = self.below[item] | self.bit[item]
            for other in before.get(item, ()):
                if other in self.below:
                    self.below[other] |= reach

    def mask(self, items: Iterable[Item]) -> int:
        """The bits of some items; unknown ones have none."""
        found = 0
        for item in items:
            found |= self.bit.get(item, 0)
        return found

    def members(self, mask: int) -> Iterator[Item]:
        """The items of a mask, in order."""
        while mask:
            low = mask & -mask
            yield self.items[low.bit_length() - 1]
            mask ^= low

    def above_all(self, mask: int) -> int:
        """Everything that comes before one of the items."""
        found = 0
        for item in self.members(mask):
            found |= self.above[item]
        return found

    def below_all(self, mask: int) -> int:
        """Everything that comes after one of the items."""
        found = 0
        for item in self.members(mask):
            found |= self.below[item]
        return found

    def detours(self, mask: int) -> int:
        """Items outside that lie on a path which leaves the set and comes back; 0 for a convex set."""
        return self.above_all(mask) & self.below_all(mask) & ~mask
