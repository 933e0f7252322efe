"""Fork and Join: a region's way to the workers and back, as autograd Functions.

    Fork(inputs, worker parameters) -> token     forward: publish the inputs; backward: wait, return their gradients
    Join(token) -> worker outputs                forward: wait, take; backward: publish the outputs' gradients

The lead's own branches take the inputs directly, and run between the two. Autograd executes what was recorded last
first, so that backward runs Join, then the lead's own branches, then Fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpsrun import log
from mpsrun.errors import NotShippable
from mpsrun.run import in_lead, philox, relay
from mpsrun.run import state as modes
from mpsrun.run.crossing import BackwardWork, Crossing, Gathering, Handed, Invocation
from mpsrun.run.executor import copy_all
from mpsrun.wire import messages as m

SECOND_BACKWARD = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already been "
    "freed). Specify retain_graph=True if you need to backward through the graph a second time."
)


def fork(crossing: Crossing, args: tuple[Any, ...]) -> tuple[Invocation | in_lead.Here, torch.Tensor | None]:
    """Send a region's arguments to the workers, which start; the token ties Join to this Fork in autograd.

    Where one of the workers is missing, or has no memory for it, the region runs in the lead.
    """
    steps = relay.current()
    if steps is not None:
        invocation = steps.invocation(crossing, args)
        return invocation, _start(invocation, args)
    if crossing.is_open():
        invocation = Invocation(crossing, args)
        with crossing.owner.lock:
            if _open(invocation, args):
                return invocation, _start(invocation, args)
    return in_lead.compute(crossing, args), None


def _open(invocation: Invocation, args: tuple[Any, ...]) -> bool:
    """Take a slot; False for memory that no worker can see, or none for the arena.

    What the call is bound to was looked at when it began. Networks of one kind share a crossing, so that another thread
    may have bound it to other parameters since then.
    """
    crossing, owner = invocation.crossing, invocation.crossing.owner
    try:
        if owner.crowded:
            owner.setup.bind(crossing, args)
        invocation.room = owner.take(crossing.forward_bytes)
    except (NotShippable, torch.OutOfMemoryError) as error:
        log.detail(f"a region runs in the lead: {error}")
        return False
    return True


def _start(invocation: Invocation, args: tuple[Any, ...]) -> torch.Tensor | None:
    if invocation.crossing.grad:
        return _Fork.apply(invocation, *(args[i] for i in invocation.crossing.wanted))
    with torch.no_grad():
        _publish(invocation, args)
    return None


def join(handle: tuple[Invocation | in_lead.Here, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """The workers' outputs, once they are there."""
    invocation, token = handle
    if isinstance(invocation, in_lead.Here):
        return invocation.outputs
    if token is not None:
        return _Join.apply(token, invocation)
    with torch.no_grad():
        outputs = _take(invocation)
    invocation.args = None
    return outputs


def _publish(invocation: Invocation, args: Sequence[Any]) -> None:
    crossing, owner = invocation.crossing, invocation.crossing.owner
    room = invocation.room
    if room is None:
        raise RuntimeError("mpsrun: an invocation without a slot")
    targets, sources = crossing.tensors(room, "inputs"), [args[place.index] for place in crossing.inputs]
    if invocation.relay is not None:
        copy_all(targets, sources)
        invocation.relay.release(crossing)
        return
    with owner.lock:
        owner.check()
        copy_all(targets, sources)
        slot = m.Slot(room.chunk.id, room.offset_bytes)
        rngs, invocation.random_start = philox.reserve(crossing)
        invocation.sequence = seq = owner.pool.next_sequence()
        flags = owner.changed_flags(crossing.links)
        message = m.Forward(seq, invocation.id, crossing.layout, slot, invocation.state, flags, rngs)
        invocation.forward = Handed(message, tuple(share.statics for share in crossing.shares))
        owner.submit(crossing, crossing.links, message, invocation.forward)


def _take(invocation: Invocation) -> tuple[torch.Tensor, ...]:
    """Wait for the outputs, commit the buffers, and give each output a tensor of its own.

    A relay has its slots to itself, and what leaves its graph is copied there.
    """
    crossing, owner = invocation.crossing, invocation.crossing.owner
    room, args = invocation.room, invocation.args
    if room is None or args is None:
        raise RuntimeError("mpsrun: a Join without its Fork")
    if invocation.relay is not None:
        invocation.relay.wait(crossing)
    else:
        owner.wait(crossing.done, invocation.sequence)
    invocation.joined = True
    if crossing.writes:
        fresh = crossing.tensors(room, "writes")
        # A buffer that plain PyTorch writes behind autograd's back must not gain a version here either.
        targets = [args[arg].data if hidden else args[arg] for arg, _, hidden in crossing.writes]
        copy_all(targets, fresh)
    views = crossing.tensors(room, "outputs")
    escaping = [i for i, escapes in enumerate(crossing.escapes) if escapes and invocation.relay is None]
    outputs = [view.detach() for view in views]
    for i in escaping:
        outputs[i] = torch.empty_like(views[i])
    copy_all([outputs[i] for i in escaping], [views[i] for i in escaping])
    return tuple(outputs)


class Function(torch.autograd.Function):
    """An autograd Function that costs less to call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without what torch does here for `torch.func`, under which no graph uses lanes."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Fork(Function):
    @staticmethod
    def forward(ctx: Any, invocation: Invocation, *wanted: torch.Tensor) -> torch.Tensor:
        crossing, args = invocation.crossing, invocation.args
        if args is None:
            raise RuntimeError("mpsrun: an invocation that is over")
        _publish(invocation, args)
        ctx.invocation = invocation
        ctx.set_materialize_grads(False)
        invocation.versions = versions_of(args, crossing.saved)
        return crossing.token.detach()

    @staticmethod
    def backward(ctx: Any, token: torch.Tensor | None) -> tuple[Any, ...]:
        invocation: Invocation = ctx.invocation
        check_versions(invocation.args, invocation.crossing.saved, invocation.versions)
        if invocation.gradients is not None:
            gradients = in_lead.differentiate(invocation)
            invocation.asked = ()
        elif invocation.backward is None:
            gradients = [None] * len(invocation.crossing.wanted)
        else:
            gradients = _collect(invocation, invocation.backward)
        if not keeps_graph():
            invocation.finish()
        return None, *gradients


def versions_of(args: Sequence[Any], saved: Sequence[int]) -> list[int]:
    """What `check_versions` compares with later."""
    return [args[i]._version for i in saved]


def check_versions(args: Sequence[Any] | None, saved: Sequence[int], versions: Sequence[int]) -> None:
    """Raise, as plain PyTorch does, where something that backward needs was changed since forward.

    What `save_for_backward` would do, in a tenth of its time: whoever calls this holds the arguments anyway. saved: the
    arguments that are needed, with the versions that they had; args: None where their backward is over.
    """
    if args is None:
        raise RuntimeError(SECOND_BACKWARD)
    if versions_of(args, saved) == versions:
        return
    for arg, version in zip(saved, versions, strict=True):
        if args[arg]._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{args[arg].type()} {list(args[arg].shape)}] is at version {args[arg]._version}; expected version "
                f"{version} instead. Hint: look for what writes to it between forward and backward."
            )


def keeps_graph() -> bool:
    """Whether the backward that runs now was asked to keep what it needs, for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class _Join(Function):
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
        if torch.is_grad_enabled() or modes.transformed(*gradients):  # computed plainly when Fork's turn comes
            invocation.gradients = gradients
        else:
            invocation.gradients = None
            _publish_gradients(invocation, gradients)
        return invocation.crossing.token, None


def _publish_gradients(invocation: Invocation, gradients: Sequence[torch.Tensor | None]) -> None:
    crossing, owner = invocation.crossing, invocation.crossing.owner
    if invocation.room is None:
        raise RuntimeError(SECOND_BACKWARD)
    gathering = crossing.gathering(tuple(gradient is not None for gradient in gradients))
    forward = invocation.forward
    if not gathering.links or forward is None:
        return
    given = [g for g in gradients if g is not None]
    if invocation.backward_relay is not None:
        _release_gradients(invocation, invocation.backward_relay, gathering, given)
        return
    owner.read_flags_in_backward()
    keep = keeps_graph()
    if invocation.noted is not None:
        invocation.noted.append((invocation, gathering))
    with owner.lock:
        invocation.release_backward()
        room = owner.take(crossing.backward_bytes)
        views = crossing.tensors(room, "grad_outputs")
        copy_all([views[i] for i in gathering.outputs], given)
        slot, seq = m.Slot(room.chunk.id, room.offset_bytes), owner.pool.next_sequence()
        flags = owner.changed_flags(gathering.links)
        message = m.Backward(seq, invocation.id, crossing.layout, slot, gathering.tasks, keep, flags)
        invocation.backward = BackwardWork(room, gathering, seq)
        invocation.asked = gathering.links
        owner.submit(crossing, gathering.links, message, forward)


def _release_gradients(
    invocation: Invocation, steps: relay.Relay, gathering: Gathering, given: Sequence[torch.Tensor]
) -> None:
    """The same as a step of a relay."""
    crossing = invocation.crossing
    room = steps.room(crossing, gathering)
    views = crossing.tensors(room, "grad_outputs")
    copy_all([views[i] for i in gathering.outputs], given)
    invocation.backward = BackwardWork(room, gathering, 0, relay=steps)
    steps.release(crossing)


def _collect(invocation: Invocation, backward: BackwardWork) -> list[torch.Tensor | None]:
    """The gradients of everything that Fork took, in memory that may be kept; in a relay, where they stand."""
    crossing, copies = invocation.crossing, backward.relay is None
    if backward.relay is not None:
        backward.relay.wait(crossing)
    else:
        crossing.owner.wait(backward.gathering.done, backward.sequence)
    backward.done = True
    found: dict[int, torch.Tensor] = {}
    singles = crossing.tensors(backward.room, "singles")
    for arg, parts in backward.gathering.singles:
        found[arg] = _sum([singles[k] for k in parts]) if copies or len(parts) > 1 else singles[parts[0]]
    wholes = crossing.tensors(backward.room, "flats")
    for flat, whole, wanted in zip(crossing.flats, wholes, backward.gathering.flats, strict=True):
        parts = torch._utils._unflatten_dense_tensors(whole.clone() if copies else whole, flat.like)
        for k, arg in wanted:
            found[arg] = found[arg].add_(parts[k]) if arg in found else parts[k]
    invocation.release_backward()
    return [found.get(arg) for arg in crossing.wanted]


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A sum in fresh memory, from left to right."""
    if len(tensors) == 1:
        return tensors[0].clone()
    total = torch.add(tensors[0], tensors[1])
    for tensor in tensors[2:]:
        total.add_(tensor)
    return total
