"""A region's way to the workers and back: Fork and Join as autograd Functions.

    Fork(inputs, worker parameters) -> token     forward: publish the inputs; backward: wait, return their gradients
    Join(token) -> worker outputs                forward: wait, take; backward: publish the outputs' gradients

The lead's own branches take the inputs directly, and run between the two. Autograd executes what was recorded last
first, so that backward runs Join, then the lead's own branches, then Fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mpsrun.device.arena import Room
from mpsrun.graph.program import Program, build
from mpsrun.graph.state import applied
from mpsrun.run import state as modes
from mpsrun.run.executor import copy_all
from mpsrun.run.layout import Gradients
from mpsrun.wire import messages as m

if TYPE_CHECKING:
    from mpsrun.run.coordinator import Coordinator
    from mpsrun.run.link import Link


@dataclass(eq=False)
class Share:
    """One worker's part of a crossing.

    args: by input of the program, the argument of the crossing. forward_at, backward_at: its layout in the two slots.
    outputs: its outputs among the outputs of the crossing. spans: its random ops among those of the region.
    """

    link: Link
    job: int
    program: Program
    layout: m.Prepare
    args: tuple[int, ...]
    gradients: Gradients
    outputs: range
    flat: tuple[Flat, ...] = ()
    spans: tuple[int, ...] = ()
    pointers: list[int] = field(default_factory=list)
    statics: dict[int, torch.Tensor] | None = None

    @property
    def static_inputs(self) -> list[int]:
        """The inputs of the program that are parameters or buffers."""
        kinds = ("parameter", "buffer")
        return [i for i, x in enumerate(self.program.inputs) if x.kind in kinds]


@dataclass(frozen=True)
class Flat:
    """Parameter gradients of one dtype that stand side by side in the slot, and are taken out in one copy."""

    place: m.Place
    inputs: tuple[int, ...]
    like: tuple[torch.Tensor, ...]


@dataclass(eq=False)
class Crossing:
    """A region under one plan for one set of shapes: everything that does not change from step to step.

    inputs: the tensors that are published in each step, by argument. saved: the arguments which backward reads again.
    escapes: by output, whether it may be seen outside of the graph and so must not be arena memory.
    """

    owner: Coordinator
    shares: tuple[Share, ...]
    inputs: tuple[m.Place, ...]
    outputs: tuple[m.Place, ...]
    differentiable: tuple[bool, ...]
    escapes: tuple[bool, ...]
    saved: tuple[int, ...]
    wanted: tuple[int, ...]
    writes: tuple[tuple[int, m.Place, bool], ...]
    forward_bytes: int
    backward_bytes: int
    grad: bool
    device: torch.device
    random_total: int = 0
    key: int = 0

    def __post_init__(self) -> None:
        self.token = torch.zeros(1, device=self.device)
        self.done = tuple(share.link.done for share in self.shares)
        self.submitted = tuple(share.link.submitted for share in self.shares)


class Invocation:
    """One execution of a crossing: its slot, and what is still under way in it.

    It lives as long as the autograd graph that may ask for its backward.
    """

    def __init__(self, crossing: Crossing, args: tuple[Any, ...]) -> None:
        self.crossing = crossing
        self.args: tuple[Any, ...] | None = args
        self.id = crossing.owner.next_invocation()
        self.stream = crossing.owner.device.stream_key()
        self.state = modes.ambient(crossing.device.type)  # here, since inside of a Function grad mode is always off
        self.room: Room | None = None
        self.forwards: dict[int, m.Forward] = {}
        self.gradients: tuple[torch.Tensor | None, ...] | None = None
        self.backward: _Backward | None = None
        self.sequence: tuple[int, ...] = ()
        self.joined = False
        self.random_start = 0

    def pending(self) -> list[tuple[int, int]]:
        return [] if self.joined else list(zip(self.crossing.done, self.sequence, strict=False))

    def release(self) -> None:
        """Give the slot back; what the workers still do in it is waited for by whoever takes it next."""
        room, self.room = self.room, None
        if room is not None:
            self.crossing.owner.retire(room, self.stream, self.pending())
        self.release_backward()

    def release_backward(self) -> None:
        backward, self.backward = self.backward, None
        if backward is not None:
            self.crossing.owner.retire(backward.room, self.stream, backward.pending())

    def __del__(self) -> None:
        if self.room is not None and self.crossing.grad:
            self.crossing.owner.abandon(self)
        self.release()


@dataclass(eq=False)
class _Backward:
    """A backward under way: its slot, which share does what, and the numbers to wait for."""

    room: Room
    shares: list[tuple[Share, tuple[int, ...]]]
    sequence: list[int]
    done: bool = False

    def pending(self) -> list[tuple[int, int]]:
        if self.done:
            return []
        return [(share.link.done, seq) for (share, _), seq in zip(self.shares, self.sequence, strict=True)]


def fork(crossing: Crossing, args: tuple[Any, ...]) -> tuple[Invocation, torch.Tensor | None]:
    """Send a region's arguments to the workers, which start; the token ties Join to this Fork in autograd."""
    invocation = Invocation(crossing, args)
    if not crossing.grad:
        with torch.no_grad():
            _publish(invocation, args)
        return invocation, None
    return invocation, _Fork.apply(invocation, *(args[i] for i in crossing.wanted))


def join(handle: tuple[Invocation, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """The workers' outputs, once they are there."""
    invocation, token = handle
    if token is not None:
        return _Join.apply(token, invocation)
    with torch.no_grad():
        outputs = _take(invocation)
    invocation.args = None
    return outputs


def _publish(invocation: Invocation, args: Sequence[Any]) -> None:
    crossing, owner = invocation.crossing, invocation.crossing.owner
    with owner.lock:
        owner.check()
        owner.bind(crossing, args)
        invocation.room = owner.take(crossing.forward_bytes)
        targets = invocation.room.tensors(crossing.key, "inputs", [place.tensor for place in crossing.inputs])
        copy_all(targets, [args[place.index].detach() for place in crossing.inputs])
        slot = m.Slot(invocation.room.chunk.id, invocation.room.offset_bytes)
        rngs, invocation.random_start = owner.reserve_random(crossing)
        invocation.sequence = owner.submit(crossing.shares, crossing.submitted)
        for share, seq, rng in zip(crossing.shares, invocation.sequence, rngs, strict=True):
            settings = share.link.changed_flags(owner.flags())
            message = m.Forward(
                seq, invocation.id, share.layout.layout, slot, invocation.state, settings, rng
            )
            invocation.forwards[share.job] = message
            share.link.hand_out(message, message, share)


def _take(invocation: Invocation) -> tuple[torch.Tensor, ...]:
    """Wait for the outputs, commit the buffers, and give each output a tensor of its own."""
    crossing, owner = invocation.crossing, invocation.crossing.owner
    room, args = invocation.room, invocation.args
    if room is None or args is None:
        raise RuntimeError("mpsrun: a Join without its Fork")
    owner.wait(crossing.done, invocation.sequence)
    invocation.joined = True
    if crossing.writes:
        fresh = room.tensors(crossing.key, "writes", [place.tensor for _, place, _ in crossing.writes])
        # A buffer that plain PyTorch writes behind autograd's back must not gain a version here either.
        targets = [args[arg].data if hidden else args[arg] for arg, _, hidden in crossing.writes]
        copy_all(targets, fresh)
    views = room.tensors(crossing.key, "outputs", [place.tensor for place in crossing.outputs])
    outputs = [torch.empty_like(v) if e else v.detach() for v, e in zip(views, crossing.escapes, strict=True)]
    escaping = [i for i, escapes in enumerate(crossing.escapes) if escapes]
    copy_all([outputs[i] for i in escaping], [views[i] for i in escaping])
    return tuple(outputs)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, invocation: Invocation, *wanted: torch.Tensor) -> torch.Tensor:
        crossing, args = invocation.crossing, invocation.args
        if args is None:
            raise RuntimeError("mpsrun: an invocation that is over")
        _publish(invocation, args)
        ctx.invocation = invocation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(args[i] for i in crossing.saved))
        return crossing.token.detach()

    @staticmethod
    def backward(ctx: Any, token: torch.Tensor | None) -> tuple[Any, ...]:
        invocation: Invocation = ctx.invocation
        _ = ctx.saved_tensors  # raises, as plain PyTorch does, where one was changed since forward
        if invocation.gradients is not None:
            gradients = _recompute(invocation)
        elif invocation.backward is None:
            gradients = [None] * len(invocation.crossing.wanted)
        else:
            gradients = _collect(invocation, invocation.backward)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            invocation.args = None
            invocation.release()
        return None, *gradients


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, invocation: Invocation) -> tuple[torch.Tensor, ...]:
        ctx.invocation = invocation
        ctx.set_materialize_grads(False)
        outputs = _take(invocation)
        flags = invocation.crossing.differentiable
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, flags, strict=True) if not d))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        invocation: Invocation = ctx.invocation
        if torch.is_grad_enabled():  # create_graph: the region is recomputed in plain PyTorch when Fork's turn comes
            invocation.gradients = gradients
        else:
            invocation.gradients = None
            _publish_gradients(invocation, gradients)
        return invocation.crossing.token, None


def _publish_gradients(invocation: Invocation, gradients: Sequence[torch.Tensor | None]) -> None:
    crossing, owner = invocation.crossing, invocation.crossing.owner
    if invocation.room is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time (or directly access saved tensors after they have "
            "already been freed). Specify retain_graph=True if you need to backward through the graph a second time."
        )
    keep = bool(torch._C._autograd._get_current_graph_task_keep_graph())
    with owner.lock:
        invocation.release_backward()
        room = owner.take(crossing.backward_bytes)
        slot = m.Slot(room.chunk.id, room.offset_bytes)
        work = []
        for share in crossing.shares:
            present = tuple(i for i, o in enumerate(share.outputs) if gradients[o] is not None)
            if present:
                refs = [place.tensor for place in share.layout.grad_outputs]
                views = room.tensors(share.layout.layout, "grad_outputs", refs)
                copy_all([views[i] for i in present], [gradients[share.outputs[i]] for i in present])
                work.append((share, present))
        sequence = owner.submit([share for share, _ in work], [share.link.submitted for share, _ in work])
        invocation.backward = _Backward(room, work, list(sequence))
        for (share, present), seq in zip(work, sequence, strict=True):
            settings = share.link.changed_flags(owner.flags())
            reached = share.gradients.reached(present)
            message = m.Backward(
                seq, invocation.id, share.layout.layout, slot, present, reached, keep, settings
            )
            share.link.hand_out(message, invocation.forwards[share.job], share)


def _collect(invocation: Invocation, backward: _Backward) -> list[torch.Tensor | None]:
    """The gradients of everything that Fork took, in memory that may be kept."""
    crossing, owner = invocation.crossing, invocation.crossing.owner
    counters = [share.link.done for share, _ in backward.shares]
    owner.wait(counters, backward.sequence)
    backward.done = True
    found: dict[int, torch.Tensor] = {}
    for share, present in reversed(backward.shares):  # autograd adds the last branch's gradient first
        for arg, gradient in _share_gradients(backward.room, share, present):
            found[arg] = gradient if arg not in found else found[arg].add_(gradient)
    invocation.release_backward()
    return [found.get(arg) for arg in crossing.wanted]


def _share_gradients(room: Room, share: Share, present: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    places = share.layout.grad_inputs
    views = room.tensors(share.layout.layout, "grad_inputs", [place.tensor for place in places])
    reached = set(share.gradients.reached(present))
    flat = {i for group in share.flat for i in group.inputs}
    result = []
    for place, view in zip(places, views, strict=True):
        if place.index in reached and place.index not in flat:
            result.append((share.args[place.index], view.clone()))
    groups = room.tensors(share.layout.layout, "flat", [group.place.tensor for group in share.flat])
    for group, whole in zip(share.flat, groups, strict=True):
        parts = torch._utils._unflatten_dense_tensors(whole.clone(), group.like)
        result += [
            (share.args[i], part) for i, part in zip(group.inputs, parts, strict=True) if i in reached
        ]
    return result


def _recompute(invocation: Invocation) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again: the shares are computed by the lead, as plain PyTorch would."""
    crossing, args = invocation.crossing, invocation.args
    gradients, invocation.gradients = invocation.gradients, None
    if gradients is None or args is None:
        raise RuntimeError("mpsrun: a Fork without the gradients of its Join")
    found: dict[int, torch.Tensor] = {}
    for share in crossing.shares:
        message = invocation.forwards[share.job]
        pairs = _plain_gradients(crossing, share, args, gradients, message)
        for arg, gradient in pairs:
            found[arg] = gradient if arg not in found else found[arg] + gradient
    return [found.get(arg) for arg in crossing.wanted]


def _plain_gradients(
    crossing: Crossing,
    share: Share,
    args: Sequence[Any],
    gradients: Sequence[torch.Tensor | None],
    message: m.Forward,
) -> list[tuple[int, torch.Tensor]]:
    present = [i for i, o in enumerate(share.outputs) if gradients[o] is not None]
    if not present:
        return []
    values = [args[arg] for arg in share.args]
    for index in share.program.writes:
        values[index] = values[index].clone()
    with crossing.owner.random_replayed(message.rng) as seek, applied(message.state):
        outputs = build(share.program, seek=seek)(*values)
    reached = share.gradients.reached(present)
    results = torch.autograd.grad(
        [outputs[i] for i in present],
        [values[i] for i in reached],
        [gradients[share.outputs[i]] for i in present],
        create_graph=True,
        allow_unused=True,
    )
    return [(share.args[i], g) for i, g in zip(reached, results, strict=True) if g is not None]


