"""From the programs of a region's workers to its Crossing: jobs, layouts, and the place of each tensor in the slots."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mpsrun.graph.program import Program, State
from mpsrun.run import state as modes
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing, Flat, Share
from mpsrun.run.layout import Gradients, Packer, TensorMeta, contiguous_stride
from mpsrun.wire import messages as m

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Part:
    """What one worker has of a region, as a program.

    args: by input of the program, the argument of the crossing; what it is stands in `tensors` or `ints`. outputs: what
    it hands out. escapes: by output, whether it may be read later than the slot is its own. spans: where its random ops
    draw, counted from the region's start. place: its share of the GPU.
    """

    worker: int
    program: Program
    args: tuple[int, ...]
    tensors: Mapping[int, TensorMeta]
    ints: Mapping[int, int]
    outputs: tuple[TensorMeta, ...]
    escapes: tuple[bool, ...]
    spans: tuple[int, ...]
    gradients: Gradients
    place: tuple[int, int]
    compiled: bool


def assemble(
    owner: Coordinator, parts: Sequence[Part], state: State, device: torch.device, random_total: int
) -> Crossing:
    """The crossing of these parts; random_total: how far it moves the generator."""
    key = next(_numbers)
    grad = torch.is_grad_enabled() and any(any(part.gradients.differentiable) for part in parts)
    slots = _Slots.of(parts, grad)
    outputs: list[m.Place] = []
    shares: list[Share] = []
    writes: list[tuple[int, m.Place, bool]] = []
    for position, part in enumerate(parts):
        layout = _layout(part, key, position, state, grad, slots)
        span = range(len(outputs), len(outputs) + len(part.outputs))
        link = owner.links[part.worker - 1]
        shares.append(Share(link, layout.job, part.program, layout, part.args, part.gradients, span, part.spans))
        outputs += layout.outputs
        hidden = dict(zip(part.program.writes, part.program.hidden, strict=True))
        writes += [(part.args[p.index], p, hidden[p.index]) for p in layout.writes]
    return Crossing(
        owner=owner,
        shares=tuple(shares),
        inputs=tuple(slots.inputs.values()),
        outputs=tuple(outputs),
        differentiable=tuple(d for part in parts for d in part.gradients.differentiable),
        escapes=tuple(escapes for part in parts for escapes in part.escapes),
        saved=tuple(sorted({part.args[i] for part in parts for i in part.gradients.saved - {*part.program.writes}})),
        wanted=tuple(sorted({share.args[p.index] for share in shares for p in share.layout.grad_inputs})),
        writes=tuple(writes),
        forward_bytes=slots.forward.size_bytes,
        backward_bytes=slots.backward.size_bytes,
        grad=grad,
        device=device,
        singles=tuple(slots.gradients.singles),
        flats=tuple(slots.gradients.flats),
        random_total=random_total,
        key=key,
    )


def _layout(part: Part, key: int, position: int, state: State, grad: bool, slots: _Slots) -> m.Prepare:
    tensors = [i for i, x in enumerate(part.program.inputs) if x.kind == "tensor"]
    return m.Prepare(
        layout=key,
        position=position,
        job=next(_numbers),
        grad=grad,
        state=state,
        inputs=[m.Place(i, slots.inputs[part.args[i]].tensor, part.tensors[i].requires_grad) for i in tensors],
        ints=dict(part.ints),
        outputs=[slots.forward.place(i, x) for i, x in enumerate(part.outputs)],
        writes=[slots.forward.place(i, part.tensors[i]) for i in part.program.writes],
        grad_outputs=[slots.backward.place(i, x) for i, x in enumerate(part.outputs)] if grad else [],
        grad_inputs=slots.gradients.of(position),
        share=part.place,
        flags=modes.flags(),
        compiled=part.compiled,
    )


@dataclass
class _Gradients:
    """Places of input gradients: (position of the part, place) one by one, or side by side in a Flat."""

    singles: list[tuple[int, m.Place]] = field(default_factory=list)
    flats: list[Flat] = field(default_factory=list)
    in_flats: list[tuple[int, m.Place]] = field(default_factory=list)

    def of(self, position: int) -> list[m.Place]:
        """All places of one part."""
        return [place for owner, place in self.singles + self.in_flats if owner == position]


@dataclass(frozen=True)
class _Slots:
    """The two slots of an execution, as they are filled; inputs: by argument."""

    forward: Packer
    backward: Packer
    inputs: Mapping[int, m.Place]
    gradients: _Gradients

    @classmethod
    def of(cls, parts: Sequence[Part], grad: bool) -> _Slots:
        forward, backward = Packer(), Packer()
        inputs = {arg: forward.place(arg, meta) for arg, meta in _published(parts)}
        return cls(forward, backward, inputs, _place_gradients(parts, backward) if grad else _Gradients())


def _published(parts: Sequence[Part]) -> list[tuple[int, TensorMeta]]:
    """The arguments that are neither parameters nor buffers: they travel in every step."""
    found = {
        part.args[i]: part.tensors[i] for part in parts for i, x in enumerate(part.program.inputs) if x.kind == "tensor"
    }
    return [(arg, found[arg]) for arg in sorted(found)]


def _place_gradients(parts: Sequence[Part], packer: Packer) -> _Gradients:
    """Places for gradients: parameters of one dtype side by side, over all parts; everything else by itself."""
    result = _Gradients()
    groups: dict[torch.dtype, list[tuple[int, int, TensorMeta]]] = {}
    for position, part in enumerate(parts):
        for i in part.gradients.reached(range(len(part.outputs))):
            meta = part.tensors[i]
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
