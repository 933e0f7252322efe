"""Which branch the rest of the nodes join: views, sizes, parameter arithmetic, counters without users."""

from collections.abc import Sequence

from torch import fx

from mpsrun.graph.facts import Effects
from mpsrun.graph.order import Order
from mpsrun.graph.structure import Structure, tuple_source


class Placement:
    """Turns sets of units into sets of nodes; `order` is the full order of dependences."""

    def __init__(self, structure: Structure, effects: Effects, order: Order[fx.Node]) -> None:
        self._structure = structure
        self._effects = effects
        self._order = order
        placed = {node for nodes in structure.units.values() for node in nodes}
        program = list(effects.order)
        self._rest = [node for node in program if node not in placed and self._movable(node)]
        self._next = _next_units(program, structure)

    def branches(self, parts: Sequence[frozenset[fx.Node]]) -> list[set[fx.Node]]:
        """The nodes of each part, with those of the rest that belong to it."""
        home: dict[fx.Node, int] = {}
        for index, units in enumerate(parts):
            for unit in units:
                home.update(dict.fromkeys(self._structure.units[unit], index))
        self._take_between(home, len(parts))
        self._take_feeding(home, parts)
        found: list[set[fx.Node]] = [set() for _ in parts]
        for node, index in home.items():
            found[index].add(node)
        return found

    def _movable(self, node: fx.Node) -> bool:
        return node.op not in ("placeholder", "get_attr", "output") and not self._effects.facts[node].is_state

    def _take_between(self, home: dict[fx.Node, int], count: int) -> None:
        """What lies on a path inside a branch belongs to it."""
        masks = [self._order.mask(node for node, at in home.items() if at == index) for index in range(count)]
        reach = [self._order.detours(mask) for mask in masks]
        for node in self._rest:
            inside = [index for index in range(count) if reach[index] & self._order.bit[node]]
            if len(inside) == 1:
                home[node] = inside[0]

    def _take_feeding(self, home: dict[fx.Node, int], parts: Sequence[frozenset[fx.Node]]) -> None:
        """What only one branch uses belongs to it; a counter without users to the work right after it."""
        units = {unit: index for index, part in enumerate(parts) for unit in part}
        for node in reversed(self._rest):
            if node in home:
                continue
            targets = {home.get(user, -1) for user in node.users}
            if not node.users and self._effects.facts[node].floating and self._effects.facts[node].writes:
                following = self._next.get(node)
                targets = {-1 if following is None else units.get(following, -1)}
            source = tuple_source(node, self._effects)
            torn = source is not None and source not in home and source not in self._rest
            if len(targets) == 1 and -1 not in targets and not torn:
                home[node] = next(iter(targets))
        self._keep_tuples_whole(home)

    def _keep_tuples_whole(self, home: dict[fx.Node, int]) -> None:
        """A tuple cannot cross: whoever takes from it stands where it stands."""
        for node in self._rest:
            source = tuple_source(node, self._effects)
            if node in home and source is not None and home.get(source) != home[node]:
                del home[node]


def _next_units(program: Sequence[fx.Node], structure: Structure) -> dict[fx.Node, fx.Node]:
    following: dict[fx.Node, fx.Node] = {}
    unit: fx.Node | None = None
    for node in reversed(program):
        if node in structure.units:
            unit = node
        elif unit is not None:
            following[node] = unit
    return following
