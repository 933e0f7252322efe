"""A graph with its regions lowered: the same ops, with Fork and Join where a region starts and ends."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from mpsrun.errors import NotShippable
from mpsrun.graph.channels_last import ChannelsLast
from mpsrun.graph.effects import Effects
from mpsrun.graph.regions import Region
from mpsrun.graph.state import State, applied, is_state_node
from mpsrun.plan.plan import Assignment
from mpsrun.plan.shares import places_of
from mpsrun.run import philox
from mpsrun.run.beside import conv2d
from mpsrun.run.counting import count
from mpsrun.run.forkjoin import fork, join
from mpsrun.run.memory_format import in_format
from mpsrun.run.pooling import max_pool2d
from mpsrun.run.specialize import Cut, Strand
from mpsrun.run.streams import LaneValues, Places, Sides, open_sides


@dataclass(frozen=True, eq=False)
class Lowered:
    """A region and what crosses at it."""

    region: Region
    cut: Cut
    assignment: Assignment

    @property
    def nodes(self) -> frozenset[fx.Node]:
        return frozenset(node for branch in self.region.branches for node in branch.nodes)


def lower(
    gm: fx.GraphModule,
    effects: Effects,
    regions: Sequence[Lowered],
    formats: ChannelsLast | None = None,
    beside: Mapping[fx.Node, fx.Node] | None = None,
    counters: Collection[fx.Node] = (),
) -> tuple[Callable[..., Any], Sequence[Strand]]:
    """A function like `gm.forward` that runs these regions on their lanes, and the strands as it forks into them.

    Nodes keep the order of the program except where a region needs to be in one piece. formats: what has its channels
    last, where anything has. beside: the convolutions whose weights have their gradients beside, with these. counters:
    what moves one on, and may do so later. Raises `NotShippable` where two regions cannot both be in one piece.
    """
    emitter = _Emitter(effects, regions, formats, beside or {}, counters)
    graph = emitter.emit(gm.graph)
    lowered = fx.GraphModule(gm, graph)
    brackets = emitter.brackets

    def run(*args: Any) -> Any:
        try:
            return lowered.forward(*args)
        except BaseException:
            brackets.unwind()
            raise

    return run if brackets.used else lowered.forward, emitter.strands


class _Brackets:
    """What is open in a lowered graph and must be closed, whatever is raised: autocast and grad modes, side streams."""

    def __init__(self) -> None:
        self.used = False
        self._local = threading.local()

    @property
    def _open(self) -> list[Callable[[], object]]:
        """How to close what this thread has opened."""
        if not hasattr(self._local, "open"):
            self._local.open = []
        return self._local.open

    def enter(self, state: State) -> Callable[[], None]:
        self.used = True

        def enter_mode() -> None:
            bracket = applied(state)
            bracket.__enter__()
            self._open.append(lambda: bracket.__exit__(None, None, None))

        return enter_mode

    def fork(self, device: torch.device, places: Places, apart: bool) -> Callable[[LaneValues], Sides]:
        self.used = True

        def open_lanes(inputs: LaneValues) -> Sides:
            sides = open_sides(device, inputs, places, apart)
            self._open.append(lambda: sides.join(()))
            return sides

        return open_lanes

    def join(self, sides: Sides, outputs: LaneValues) -> None:
        self._open.pop()
        sides.join(outputs)

    def leave(self) -> None:
        self._open.pop()()

    def unwind(self) -> None:
        """Close what an exception left open."""
        while self._open:
            self.leave()


@dataclass(frozen=True)
class _Open:
    """An open region, in the new graph: the handle of its Fork, where the lead's own random ops draw, its streams.

    apart: whether some of these, or of those of a region around it, share parameters.
    """

    handle: fx.Node | None = None
    random: Mapping[fx.Node, int] = field(default_factory=dict)
    random_total: int = 0
    sides: fx.Node | None = None
    lane_of: Mapping[fx.Node, int] = field(default_factory=dict)
    apart: bool = False


NOWHERE = _Open()
FASTER: Mapping[Any, Callable[..., Any]] = {F.max_pool2d: max_pool2d}  # where the channels come last


class _Emitter:
    def __init__(
        self,
        effects: Effects,
        regions: Sequence[Lowered],
        formats: ChannelsLast | None,
        beside: Mapping[fx.Node, fx.Node],
        counters: Collection[fx.Node],
    ) -> None:
        self.brackets = _Brackets()
        self._effects = effects
        self._formats, self._beside, self._counters = formats, beside, counters
        self._regions = regions
        self._graph = fx.Graph()
        self._values: dict[fx.Node, fx.Node] = {}
        self._turned: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = {}  # with what they were made of
        self._state: State | None = None
        self._lane = 0
        self._handles: list[fx.Node] = []
        self.strands: list[Strand] = []

    def emit(self, source: fx.Graph) -> fx.Graph:
        body = []
        for node in source.nodes:
            if node.op == "placeholder":
                self._copy(node)
            elif node.op != "output" and not is_state_node(node):
                body.append(node)
        self._emit_group(body, self._regions)
        self._set_state(None)
        # Outputs are read where they stand in their slots: no slot may be free before the last op is submitted.
        self._graph.call_function(_named("release", _release), tuple(self._handles))
        self._copy(source.output_node())
        return self._graph

    def _emit_group(self, nodes: Sequence[fx.Node], regions: Sequence[Lowered], within: _Open = NOWHERE) -> None:
        """Emit nodes in program order, each of the outermost regions among them in one piece."""
        inside = set(nodes)
        fitting = [r for r in regions if r.nodes <= inside]
        outer = [r for r in fitting if not any(r.nodes < other.nodes for other in fitting)]
        unit_of: dict[fx.Node, Any] = {node: node for node in nodes}
        for region in outer:
            unit_of.update(dict.fromkeys(region.nodes, region))
        for unit in self._ordered(nodes, unit_of):
            if isinstance(unit, Lowered):
                self._set_lane(0, within)
                self._emit_region(unit, [r for r in fitting if r is not unit], within)
            else:
                self._emit_node(unit, within)

    def _ordered(self, nodes: Sequence[fx.Node], unit_of: Mapping[fx.Node, Any]) -> Iterable[Any]:
        """Units in topological order, earliest in the program first."""
        effects = self._effects
        rank: dict[Any, int] = {}
        before: dict[Any, set[Any]] = {}
        for node in nodes:
            unit = unit_of[node]
            rank[unit] = min(rank.get(unit, effects.order[node]), effects.order[node])
            sources = effects.deps.get(node, set()) | effects.random_order.get(node, set())
            needs = before.setdefault(unit, set())
            needs.update(unit_of[s] for s in sources if s in unit_of and unit_of[s] is not unit)
        after: dict[Any, list[Any]] = {}
        for unit, needs in before.items():
            for need in needs:
                after.setdefault(need, []).append(unit)
        left = {unit: len(needs) for unit, needs in before.items()}
        index = {unit: i for i, unit in enumerate(before)}
        heap = [(rank[unit], index[unit], unit) for unit in before if not left[unit]]
        heapq.heapify(heap)
        count = 0
        while heap:
            _, _, unit = heapq.heappop(heap)
            count += 1
            yield unit
            for follower in after.get(unit, ()):
                left[follower] -= 1
                if not left[follower]:
                    heapq.heappush(heap, (rank[follower], index[follower], follower))
        if count < len(before):
            raise NotShippable("it is interleaved with another region")

    def _emit_region(self, lowered: Lowered, regions: Sequence[Lowered], within: _Open) -> None:
        self._set_state(None)
        number, strands, cut = lowered.region.index, lowered.cut.strands, lowered.cut
        handles = []
        for strand in strands:
            args = tuple(self._values[node] for node in strand.args)
            handles.append(self._graph.call_function(_forking(f"fork_{number}", strand), args))
        self._handles += handles
        self.strands += strands
        apart = within.apart or self._share_leaves(cut)
        sides = self._open_sides(lowered, apart) if cut.sides else None
        random = cut.random if strands and strands[0].crossing.random_total else {}
        total = strands[0].crossing.random_total if strands else 0
        handle = handles[0] if handles else None
        self._emit_group(cut.own, regions, _Open(handle, random, total, sides, cut.lane_of, apart))
        self._set_state(None)
        if sides is not None:
            self._close_sides(cut, sides)
        for strand, handle in zip(strands, handles, strict=True):
            outputs = self._graph.call_function(_named(f"join_{number}", join), (handle,))
            for i, node in enumerate(strand.outputs):
                self._values[node] = self._graph.call_function(_item, (outputs, i))

    def _share_leaves(self, cut: Cut) -> bool:
        """Whether two lanes of the lead read the same leaf, whose cast autocast would keep."""
        read: dict[int, set[fx.Node]] = {}
        for node in cut.own:
            given = (source for source in node.all_input_nodes if source.op == "placeholder")
            leaves = {source for source in given if getattr(source.meta.get("example_value"), "requires_grad", True)}
            read.setdefault(cut.lane_of.get(node, 0), set()).update(leaves)
        return sum(map(len, read.values())) > len(set[fx.Node]().union(*read.values()))

    def _open_sides(self, lowered: Lowered, apart: bool) -> fx.Node:
        cut = lowered.cut
        inputs = tuple((side.lane, tuple(self._values[node] for node in side.inputs)) for side in cut.sides)
        open_lanes = self.brackets.fork(cut.device, places_of(lowered.assignment), apart)
        return self._graph.call_function(_named("fork_streams", open_lanes), (inputs,))

    def _close_sides(self, cut: Cut, sides: fx.Node) -> None:
        outputs = tuple((side.lane, tuple(self._values[node] for node in side.outputs)) for side in cut.sides)
        self._graph.call_function(_named("join_streams", self.brackets.join), (sides, outputs))
        self._lane = 0

    def _emit_node(self, node: fx.Node, within: _Open) -> None:
        self._set_state(self._effects.facts[node].state)
        self._set_lane(within.lane_of.get(node, 0), within)
        start = within.random.get(node)
        if start is None:
            self._copy(node, within)
            return
        self._graph.call_function(_named("seek", philox.seek), (within.handle, start))
        self._copy(node, within)
        self._graph.call_function(_named("seek", philox.seek), (within.handle, within.random_total))

    def _copy(self, node: fx.Node, within: _Open = NOWHERE) -> None:
        copied = self._values[node] = self._graph.node_copy(node, lambda source: self._given(node, source, within))
        if self._formats is not None and node in self._formats.takes:
            copied.target = FASTER.get(copied.target, copied.target)
        if node in self._counters:
            copied.op, copied.target = "call_function", count
        if node in self._beside:
            copied.target = conv2d
            copied.kwargs = {**copied.kwargs, "weight_format": self._wanted(node, self._beside[node])}
        written = self._effects.facts[node].writes
        if written and self._turned:
            facts = self._effects.facts
            self._turned = {key: made for key, made in self._turned.items() if not facts[made[0]].outputs & written}

    def _given(self, node: fx.Node, source: fx.Node, within: _Open) -> fx.Node:
        """The value of `source` as `node` is to get it: turned where `node` runs, once for all on its lane."""
        value, wanted = self._values[source], self._wanted(node, source)
        if wanted is None or self._beside.get(node) is source:
            return value
        key = source, wanted, within.sides, self._lane, self._state
        if key not in self._turned:
            self._turned[key] = source, self._graph.call_function(in_format, (value, wanted))
        return self._turned[key][1]

    def _wanted(self, node: fx.Node, source: fx.Node) -> torch.memory_format | None:
        return self._formats.wanted(node, source) if self._formats is not None else None

    def _set_lane(self, lane: int, within: _Open) -> None:
        if lane != self._lane:
            self._graph.call_function(_use_lane, (within.sides, lane))
            self._lane = lane

    def _set_state(self, state: State | None) -> None:
        if state == self._state:
            return
        if self._state is not None:
            self._graph.call_function(_named("leave_mode", self.brackets.leave), ())
        if state is not None:
            self._graph.call_function(_named("enter_mode", self.brackets.enter(state)), ())
        self._state = state


def _release(*handles: object) -> None:
    """Keeps what it is given alive until it is called."""


def _use_lane(sides: Sides, lane: int) -> None:
    sides.use(lane)


def _item(values: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    return values[index]


def _forking(name: str, strand: Strand) -> Callable[..., Any]:
    return _named(name, lambda *args: fork(strand.crossing, args))


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fx can write down as a global of its own."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "mpsrun"
    return call
