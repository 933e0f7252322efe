"""Cuts a region along its plan: which of its nodes are whose, those of workers as programs, and what crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from mpsrun.errors import NotShippable
from mpsrun.graph.effects import Effects
from mpsrun.graph.program import State, extract
from mpsrun.graph.regions import Branch, Region
from mpsrun.plan.lanes import is_stream, is_worker
from mpsrun.plan.plan import Assignment
from mpsrun.plan.shares import EVERYWHERE, Places, places_of
from mpsrun.run import state as modes
from mpsrun.run.assemble import Part, assemble
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing
from mpsrun.run.layout import TensorMeta, trace_gradients
from mpsrun.run.observe import Observation

# Ops that share a tensor's memory but not its autograd history: autograd may save the result for much longer.
DETACHING = frozenset({"detach", "detach_", torch.detach, getattr(torch._C._autograd, "_get_data_attr", None)})


@dataclass(eq=False)
class Strand:
    """Branches whose outputs end in the same outputs of the graph, so that backward reaches all of them or none.

    crossing: their way to the workers, another one once workers were started again. args: outside nodes which their
    workers need. outputs: their nodes which others need. where: the user's line.
    """

    crossing: Crossing
    args: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    where: str


@dataclass(frozen=True)
class Cut:
    """A region cut along its plan.

    jobs: by branch, the job which it is part of, 0 in the lead. own: nodes left to the lead. random: by node of the
    lead, the offset of its draws from the region's start. sides: the lead's side streams that are used; lane_of: by
    node on one of them, its lane.
    """

    device: torch.device
    strands: tuple[Strand, ...]
    jobs: tuple[int, ...]
    own: tuple[fx.Node, ...]
    random: Mapping[fx.Node, int]
    sides: tuple[Side, ...] = ()
    lane_of: Mapping[fx.Node, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """What one side stream reads from outside, and what others need of it."""

    lane: int
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class Cutter:
    """Cuts the regions of one graph; one object a graph."""

    def __init__(self, coordinator: Coordinator | None, effects: Effects, returned: Sequence[fx.Node]) -> None:
        self._coordinator = coordinator
        self._effects = effects
        facts = effects.facts
        cut_off = [node for node in effects.order if node.op.startswith("call") and node.target in DETACHING]
        self._visible = frozenset().union(*(facts[node].outputs for node in (*returned, *cut_off)))
        self._ends: dict[fx.Node, set[int]] = {}  # by node, the graph's outputs that depend on it
        for number, node in enumerate(returned):
            self._mark(node, number)

    @property
    def _owner(self) -> Coordinator:
        if self._coordinator is None:
            raise NotShippable("there are no workers")
        return self._coordinator

    def _mark(self, end: fx.Node, number: int) -> None:
        stack = [end]
        while stack:
            node = stack.pop()
            ends = self._ends.setdefault(node, set())
            if number not in ends:
                ends.add(number)
                stack.extend(node.all_input_nodes)

    def cut(self, region: Region, assignment: Assignment, seen: Observation, compiled: bool = False) -> Cut:
        """What crosses at a region under an assignment, compiled by its workers or not.

        Raises `NotShippable` with the reason.
        """
        device = _device_of(region, seen)
        if any(map(is_worker, assignment.lanes)) and device.type != self._owner.device.kind:
            raise NotShippable(f"its tensors are on {device}, the workers use {self._owner.device.kind}")
        state = modes.ambient(device.type)
        laned = list(zip(region.branches, assignment.lanes, strict=True))
        own = tuple(node for branch, lane in laned if not is_worker(lane) for node in branch.nodes)
        places, total = _random_starts(region, seen)
        starts = places
        groups: dict[frozenset[int], list[tuple[Branch, int]]] = {}
        for branch, lane in laned:
            if is_worker(lane):
                ends = frozenset(end for node in branch.outputs for end in self._ends.get(node, ()))
                groups.setdefault(ends, []).append((branch, lane))
        strands = []
        jobs: dict[Branch, int] = {}
        for group in groups.values():
            parts, args, outputs = self._parts(group, seen, state, places_of(assignment), starts, compiled)
            crossing = assemble(self._owner, parts, state, device, total)
            strands.append(Strand(crossing, args, outputs, region.where or "a region"))
            job_of = {share.link.index: share.job for share in crossing.shares}
            jobs |= {branch: job_of[lane] for branch, lane in group}
            # The first strand takes the whole region's share of the random sequence; the others count from its end.
            starts, total = {node: start - total for node, start in starts.items()}, 0
        return Cut(
            device,
            tuple(strands),
            tuple(jobs.get(b, 0) for b in region.branches),
            own,
            {node: places[node] for node in own if node in places},
            tuple(self._side(lane, laned) for lane in sorted({lane for _, lane in laned if is_stream(lane)})),
            {node: lane for branch, lane in laned if is_stream(lane) for node in branch.nodes},
        )

    def _side(self, lane: int, laned: Sequence[tuple[Branch, int]]) -> Side:
        chosen = [branch for branch, other in laned if other == lane]
        kind = self._effects.placeholder_kind
        inputs = (n for branch in chosen for n in branch.inputs if kind.get(n) not in ("parameter", "buffer"))
        return Side(lane, tuple(dict.fromkeys(inputs)), tuple(n for branch in chosen for n in branch.outputs))

    def _parts(
        self,
        laned: Sequence[tuple[Branch, int]],
        seen: Observation,
        state: State,
        places: Places,
        starts: Mapping[fx.Node, int],
        compiled: bool,
    ) -> tuple[list[Part], tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """These branches by worker, and which nodes are the arguments and the outputs of all of them.

        Random ops are not compiled, since Inductor draws other numbers.
        """
        found = []
        arg_of: dict[fx.Node, int] = {}
        handed_out: list[fx.Node] = []
        for worker in sorted({lane for _, lane in laned}):
            chosen = [branch for branch, lane in laned if lane == worker]
            nodes = sorted((n for b in chosen for n in b.nodes), key=self._effects.order.__getitem__)
            outputs = [node for branch in chosen for node in branch.outputs]
            program, inputs = extract(nodes, self._effects, outputs)
            metas = [seen.metas[node] for node in inputs]
            for node in inputs:
                arg_of.setdefault(node, len(arg_of))
            gradients = trace_gradients(program, metas, state)
            random = [node for node in nodes if self._effects.facts[node].random]
            kinds = [x.kind for x in program.inputs]
            found.append(
                Part(
                    worker=worker,
                    program=program,
                    args=tuple(arg_of[node] for node in inputs),
                    tensors={i: _tensor(metas[i], inputs[i]) for i, kind in enumerate(kinds) if kind != "int"},
                    ints={i: x for i, x in enumerate(metas) if isinstance(x, int)},
                    outputs=tuple(_tensor(seen.metas[node], node) for node in outputs),
                    escapes=tuple(map(self._escapes, outputs, gradients.differentiable)),
                    spans=tuple(starts[node] for node in random),
                    gradients=gradients,
                    place=places.get(worker, EVERYWHERE),
                    compiled=compiled and not random,
                )
            )
            handed_out += outputs
        return found, tuple(arg_of), tuple(handed_out)

    def _escapes(self, node: fx.Node, differentiable: bool) -> bool:
        """Whether a value may still be read when its region's backward is over, or without autograd at all.

        Others may save what has no gradient of its own, for a backward that this region has no part in.

        What ends in several outputs of the graph can be differentiated in parts: one part's backward gives the slot
        back, and the other would read it later.
        """
        if torch.is_grad_enabled() and not differentiable:
            return True
        return bool(self._effects.facts[node].outputs & self._visible) or len(self._ends.get(node, ())) > 1


def _tensor(meta: TensorMeta | int, node: fx.Node) -> TensorMeta:
    if not isinstance(meta, TensorMeta):
        raise NotShippable(f"expected a tensor from {node.name}, found {meta!r}")
    return meta


def _device_of(region: Region, seen: Observation) -> torch.device:
    metas = (seen.metas.get(node) for branch in region.branches for node in branch.outputs)
    device = next((meta.device for meta in metas if isinstance(meta, TensorMeta)), None)
    if device is None:
        raise NotShippable("none of its branches hands out a tensor")
    return device


def _random_starts(region: Region, seen: Observation) -> tuple[dict[fx.Node, int], int]:
    """Where each random op of a region draws, counted from the region's start in program order."""
    starts: dict[fx.Node, int] = {}
    total = 0
    order = {node: i for i, node in enumerate(seen.random_steps)}
    nodes = [n for branch in region.branches for n in branch.nodes if n in order]
    for node in sorted(nodes, key=order.__getitem__):
        starts[node] = total
        total += seen.random_steps[node]
    return starts, total
