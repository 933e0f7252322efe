"""From a planned region and what was seen of its tensors to a Crossing: programs, layouts, places in the slots."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from mpsrun.errors import NotShippable
from mpsrun.graph.effects import Effects
from mpsrun.graph.program import Program, State, extract
from mpsrun.graph.regions import Branch, Region
from mpsrun.plan.lanes import is_stream, is_worker
from mpsrun.plan.plan import Assignment
from mpsrun.plan.shares import EVERYWHERE, Places, places_of
from mpsrun.run import state as modes
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing, Flat, Share
from mpsrun.run.layout import Gradients, Packer, TensorMeta, contiguous_stride, trace_gradients
from mpsrun.run.observe import Observation
from mpsrun.wire import messages as m

_numbers = itertools.count(1)
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


@dataclass(frozen=True)
class _Part:
    """One worker's nodes as a program; `args` and `metas` are by input of the program, `place` is its share's.

    compiled: whether it is to be; not where it is random, since Inductor draws other numbers.
    """

    worker: int
    program: Program
    args: tuple[int, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    metas: tuple[TensorMeta | int, ...]
    random: tuple[fx.Node, ...]
    gradients: Gradients
    place: tuple[int, int]
    compiled: bool


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
            parts = self._parts(group, seen, state, places_of(assignment), compiled)
            args = tuple(dict.fromkeys(node for part in parts for node in part.inputs))
            outputs = tuple(node for part in parts for node in part.outputs)
            crossing = self._crossing(parts, args, seen, state, device, starts, total)
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
        self, laned: Sequence[tuple[Branch, int]], seen: Observation, state: State, places: Places, compiled: bool
    ) -> list[_Part]:
        found = []
        arg_of: dict[fx.Node, int] = {}
        for worker in sorted({lane for _, lane in laned}):
            chosen = [branch for branch, lane in laned if lane == worker]
            nodes = sorted((n for b in chosen for n in b.nodes), key=self._effects.order.__getitem__)
            outputs = [node for branch in chosen for node in branch.outputs]
            program, inputs = extract(nodes, self._effects, outputs)
            metas = tuple(seen.metas[node] for node in inputs)
            for node in inputs:
                arg_of.setdefault(node, len(arg_of))
            gradients = trace_gradients(program, metas, state)
            args = tuple(arg_of[node] for node in inputs)
            random = tuple(node for node in nodes if self._effects.facts[node].random)
            place = places.get(worker, EVERYWHERE)
            found.append(
                _Part(
                    worker,
                    program,
                    args,
                    tuple(inputs),
                    tuple(outputs),
                    metas,
                    random,
                    gradients,
                    place,
                    compiled and not random,
                )
            )
        return found

    def _crossing(
        self,
        parts: Sequence[_Part],
        args: Sequence[fx.Node],
        seen: Observation,
        state: State,
        device: torch.device,
        starts: Mapping[fx.Node, int],
        random_total: int,
    ) -> Crossing:
        key = next(_numbers)
        grad = torch.is_grad_enabled() and any(any(part.gradients.differentiable) for part in parts)
        forward, backward = Packer(), Packer()
        places = {i: forward.place(i, x) for i, x in _published(parts, args, seen)}
        outputs: list[m.Place] = []
        shares: list[Share] = []
        writes: list[tuple[int, m.Place, bool]] = []
        gradients = _place_gradients(parts, backward) if grad else _Gradients()
        for position, part in enumerate(parts):
            wants = gradients.of(position)
            share = self._share(
                part, (key, position), places, seen, state, grad, wants, forward, backward, len(outputs)
            )
            outputs += share.layout.outputs
            hidden = dict(zip(part.program.writes, part.program.hidden, strict=True))
            writes += [(part.args[p.index], p, hidden[p.index]) for p in share.layout.writes]
            share.spans = tuple(starts[node] for node in part.random)
            shares.append(share)
        wanted = {s.args[p.index] for s in shares for p in s.layout.grad_inputs}
        return Crossing(
            owner=self._owner,
            shares=tuple(shares),
            inputs=tuple(places.values()),
            outputs=tuple(outputs),
            differentiable=tuple(d for part in parts for d in part.gradients.differentiable),
            escapes=tuple(
                self._escapes(node) or (torch.is_grad_enabled() and not differentiable)
                for part in parts
                for node, differentiable in zip(part.outputs, part.gradients.differentiable, strict=True)
            ),
            saved=tuple(
                sorted({part.args[i] for part in parts for i in part.gradients.saved - {*part.program.writes}})
            ),
            wanted=tuple(sorted(wanted)),
            writes=tuple(writes),
            forward_bytes=forward.size_bytes,
            backward_bytes=backward.size_bytes,
            grad=grad,
            device=device,
            singles=tuple(gradients.singles),
            flats=tuple(gradients.flats),
            random_total=random_total,
            key=key,
        )

    def _share(
        self,
        part: _Part,
        number: tuple[int, int],
        places: Mapping[int, m.Place],
        seen: Observation,
        state: State,
        grad: bool,
        wants: list[m.Place],
        forward: Packer,
        backward: Packer,
        first_output: int,
    ) -> Share:
        out_metas = [_tensor(seen.metas[node], node) for node in part.outputs]
        tensors = [i for i, x in enumerate(part.program.inputs) if x.kind == "tensor"]
        layout = m.Prepare(
            layout=number[0],
            position=number[1],
            job=next(_numbers),
            grad=grad,
            state=state,
            inputs=[_at(places[part.args[i]], i, part.metas[i]) for i in tensors],
            ints={i: x for i, x in enumerate(part.metas) if isinstance(x, int)},
            outputs=[forward.place(i, x) for i, x in enumerate(out_metas)],
            writes=[forward.place(i, _tensor(part.metas[i], part.inputs[i])) for i in part.program.writes],
            grad_outputs=[backward.place(i, x) for i, x in enumerate(out_metas)] if grad else [],
            grad_inputs=wants,
            share=part.place,
            flags=modes.flags(),
            compiled=part.compiled,
        )
        span = range(first_output, first_output + len(out_metas))
        link = self._owner.links[part.worker - 1]
        return Share(link, layout.job, part.program, layout, part.args, part.gradients, span)

    def _escapes(self, node: fx.Node) -> bool:
        """Whether a value may still be read when its region's backward is over, or without autograd at all.

        Others may save what has no gradient of its own, for a backward that this region has no part in.

        What ends in several outputs of the graph can be differentiated in parts: one part's backward gives the slot
        back, and the other would read it later.
        """
        return bool(self._effects.facts[node].outputs & self._visible) or len(self._ends.get(node, ())) > 1


def _published(parts: Sequence[_Part], args: Sequence[fx.Node], seen: Observation) -> list[tuple[int, TensorMeta]]:
    """The arguments that are neither parameters nor buffers: they travel in every step."""
    kinds = {arg: x.kind for part in parts for arg, x in zip(part.args, part.program.inputs, strict=True)}
    return [(i, _tensor(seen.metas[args[i]], args[i])) for i in sorted(kinds) if kinds[i] == "tensor"]


@dataclass
class _Gradients:
    """Places of input gradients: (position of the part, place) one by one, or side by side in a Flat."""

    singles: list[tuple[int, m.Place]] = field(default_factory=list)
    flats: list[Flat] = field(default_factory=list)
    in_flats: list[tuple[int, m.Place]] = field(default_factory=list)

    def of(self, position: int) -> list[m.Place]:
        """All places of one part."""
        return [place for owner, place in self.singles + self.in_flats if owner == position]


def _place_gradients(parts: Sequence[_Part], packer: Packer) -> _Gradients:
    """Places for gradients: parameters of one dtype side by side, over all parts; everything else by itself."""
    result = _Gradients()
    groups: dict[torch.dtype, list[tuple[int, int, TensorMeta]]] = {}
    for position, part in enumerate(parts):
        for i in part.gradients.reached(range(len(part.outputs))):
            meta = _tensor(part.metas[i], part.inputs[i])
            if part.program.inputs[i].kind == "parameter" and meta.stride == contiguous_stride(meta.shape):
                groups.setdefault(meta.dtype, []).append((position, i, meta))
            else:
                result.singles.append((position, packer.place(i, meta)))
    for dtype, group in groups.items():
        packer.align()
        row = [(position, packer.place(i, meta, align_bytes=dtype.itemsize)) for position, i, meta in group]
        count = sum(torch.Size(meta.shape).numel() for _, _, meta in group)
        first = row[0][1].tensor
        whole = m.TensorRef(0, first.offset_bytes, (count,), (1,), first.dtype)
        like = tuple(torch.empty(meta.shape, dtype=dtype, device="meta") for _, _, meta in group)
        result.flats.append(Flat(whole, tuple((position, i) for position, i, _ in group), like))
        result.in_flats += row
    return result


def _at(place: m.Place, index: int, meta: TensorMeta | int) -> m.Place:
    wants = isinstance(meta, TensorMeta) and meta.requires_grad
    return m.Place(index, place.tensor, wants)


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
