"""What is known of a region's way to the workers: shares, places, and the state of one execution."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mpsrun.device.arena import Room
from mpsrun.graph.program import Program
from mpsrun.run import state as modes
from mpsrun.run.layout import Gradients
from mpsrun.wire import messages as m

if TYPE_CHECKING:
    from mpsrun.run.coordinator import Coordinator
    from mpsrun.run.link import Link
    from mpsrun.run.relay import Relay

_ids = itertools.count(1)


@dataclass(eq=False)
class Share:
    """One worker's part of a crossing.

    args: by input of the program, the argument of the crossing. outputs: its outputs among those of the crossing.
    spans: where its random ops draw, counted from the region's start. pointers, statics: where the parameters and
    buffers were when its worker was told, and which they are; binds: how often it was told.
    """

    link: Link
    job: int
    program: Program
    layout: m.Prepare
    args: tuple[int, ...]
    gradients: Gradients
    outputs: range
    spans: tuple[int, ...] = ()
    pointers: list[int] | None = None
    binds: int = 0
    chunks: tuple[int, ...] = ()
    statics: dict[int, weakref.ref[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = ("parameter", "buffer")
        self.static_inputs = [i for i, x in enumerate(self.program.inputs) if x.kind in kinds]
        self.static_args = [self.args[i] for i in self.static_inputs]

    def is_bound_to(self, args: Sequence[Any] | Mapping[int, Any]) -> bool:
        """Whether the worker has been told where the parameters and buffers among these arguments are."""
        return [args[i].data_ptr() for i in self.static_args] == self.pointers


class Handed(NamedTuple):
    """A forward as it was handed out, and by position the parameters and buffers that it saw.

    Networks of one kind share a crossing: the next forward may see another's.
    """

    message: m.Forward
    statics: tuple[dict[int, weakref.ref[torch.Tensor]], ...]


@dataclass(frozen=True)
class Flat:
    """Parameter gradients of one dtype that stand side by side in the slot, and are taken out in one copy.

    members: (position of the share, input of its program) for each, in order; like: their shapes.
    """

    whole: m.TensorRef
    members: tuple[tuple[int, int], ...]
    like: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Gathering:
    """What backward does when these outputs have a gradient.

    links, done: the workers that take part, and their counters. tasks: by position of the share, its outputs with a
    gradient and the inputs which get one. singles: by argument, the single gradients that add up to its own. flats: for
    each Flat, the (position, argument) pairs that are wanted.
    """

    outputs: tuple[int, ...]
    links: tuple[Link, ...]
    done: tuple[int, ...]
    tasks: tuple[m.Task, ...]
    singles: tuple[tuple[int, tuple[int, ...]], ...]
    flats: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(eq=False)
class Crossing:
    """A region under one plan for one set of shapes: everything that does not change from step to step.

    inputs: the tensors that are published in each step, by argument. saved: the arguments which backward reads again.
    escapes: by output, whether it may be seen outside of the graph and so must not be arena memory. wanted: the
    arguments that get a gradient; singles: where each such gradient stands, but for those which `flats` hold.
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
    singles: tuple[tuple[int, m.Place], ...] = ()
    flats: tuple[Flat, ...] = ()
    random_total: int = 0
    key: int = 0
    is_replaced = False  # by one with other workers; no field

    def __post_init__(self) -> None:
        self.token = torch.zeros(1, device=self.device)
        self.links = tuple(share.link for share in self.shares)
        self.done = tuple(link.done for link in self.links)
        self.share_of = dict(zip(self.links, self.shares, strict=True))
        self.layout = self.shares[0].layout.layout
        self.random = bool(self.random_total) or any(share.spans for share in self.shares)
        self._gatherings: dict[tuple[bool, ...], Gathering] = {}
        self._refs = {
            "inputs": [place.tensor for place in self.inputs],
            "outputs": [place.tensor for place in self.outputs],
            "writes": [place.tensor for _, place, _ in self.writes],
            "grad_outputs": [place.tensor for share in self.shares for place in share.layout.grad_outputs],
            "singles": [place.tensor for _, place in self.singles],
            "flats": [flat.whole for flat in self.flats],
        }

    def is_ready(self) -> bool:
        """Whether every worker has prepared its part, or has no memory for it."""
        return all(link.answered(self.layout) for link in self.links)

    def is_open(self) -> bool:
        """Whether all of its workers are there and have prepared it; otherwise the lead computes the region.

        A worker that compiles for another region is not waited for.
        """
        return all(link.lost is None and self.layout in link.prepared and not link.compiles for link in self.links)

    def no_memory(self) -> str | None:
        """Which worker had no memory for it, and what it said; then it stays in the lead."""
        short = (link for link in self.links if self.layout in link.no_memory)
        return next((f"no memory in worker {link.index}: {link.no_memory[self.layout]}" for link in short), None)

    def renewed(self, current: Sequence[Link]) -> Crossing | None:
        """The same with the processes that took the places of lost ones; None where nothing has changed.

        What is under way keeps this one. The shares of other workers are the same objects, which the one that is
        not replaced has forgotten in the end. `current`: the links that there are now, worker 1 first.
        """
        stale = [link for link in self.links if link.lost is not None and current[link.index - 1].lost is None]
        if not stale or self.no_memory() is not None:
            return None
        return replace(
            self,
            shares=tuple(
                replace(share, link=current[share.link.index - 1], pointers=None, binds=0, chunks=(), statics={})
                if share.link in stale
                else share
                for share in self.shares
            ),
        )

    def __del__(self) -> None:
        if self.is_replaced:
            return
        for share in self.shares:
            self.owner.garbage.forget(share.link, share.layout.layout, share.job)

    def tensors(self, room: Room, part: str) -> list[torch.Tensor]:
        """The tensors of one part of this crossing in a slot."""
        return room.tensors(self.key, part, self._refs[part])

    def gathering(self, present: tuple[bool, ...]) -> Gathering:
        """What backward does when just these outputs have a gradient; worked out once."""
        found = self._gatherings.get(present)
        if found is None:
            found = self._gatherings[present] = self._gather(present)
        return found

    def _gather(self, present: tuple[bool, ...]) -> Gathering:
        tasks = []
        for share in self.shares:
            local = tuple(i for i, output in enumerate(share.outputs) if present[output])
            tasks.append(m.Task(local, share.gradients.reached(local) if local else ()))
        reached = {position: frozenset(task.inputs) for position, task in enumerate(tasks)}
        links = tuple(link for link, task in zip(self.links, tasks, strict=True) if task.outputs)
        by_arg: dict[int, list[int]] = {}
        for k, (position, place) in reversed(list(enumerate(self.singles))):  # autograd adds the last branch first
            if place.index in reached.get(position, ()):
                by_arg.setdefault(self.shares[position].args[place.index], []).append(k)
        flats = tuple(
            tuple(
                (k, self.shares[position].args[i])
                for k, (position, i) in enumerate(flat.members)
                if i in reached.get(position, ())
            )
            for flat in self.flats
        )
        outputs = tuple(i for i, has in enumerate(present) if has)
        singles = tuple((a, tuple(k)) for a, k in by_arg.items())
        return Gathering(outputs, links, tuple(link.done for link in links), tuple(tasks), singles, flats)


class Invocation:
    """One execution of a crossing: its slot, and what is still under way in it.

    It lives as long as the autograd graph that may ask for its backward.

    relay: where forward is a step of one, which is replayed in the same slot. backward_relay: set while backward is
    one of the steps of that. noted: where a backward that is none leaves word of itself, if anywhere.
    """

    def __init__(self, crossing: Crossing, args: tuple[Any, ...]) -> None:
        self.crossing = crossing
        self.args: tuple[Any, ...] | None = args
        self.id = next(_ids)
        self.stream = crossing.owner.device.stream_key()
        self.state = modes.ambient(crossing.device.type)  # here, since inside of a Function grad mode is always off
        self.room: Room | None = None
        self.forward: Handed | None = None
        self.gradients: tuple[torch.Tensor | None, ...] | None = None
        self.backward: BackwardWork | None = None
        self.sequence = 0
        self.versions: list[int] = []  # of the arguments that backward reads again, when forward took them
        self.joined = False
        self.asked: tuple[Link, ...] = ()  # the workers that backward was handed out to
        self.random_start = 0
        self.relay: Relay | None = None
        self.backward_relay: Relay | None = None
        self.noted: list[tuple[Invocation, Gathering]] | None = None

    def pending(self) -> list[tuple[int, int]]:
        return [] if self.joined or self.forward is None else [(done, self.sequence) for done in self.crossing.done]

    def release(self) -> None:
        """Give the slot back; what the workers still do in it is waited for by whoever takes it next."""
        room, self.room = self.room, None
        if room is not None:
            backward = self.backward.pending() if self.backward is not None else []
            self.crossing.owner.retire(room, self.stream, [*self.pending(), *backward])
        self.release_backward()

    def finish(self) -> None:
        """Backward is over: the workers that had no part in it may forget their forward, too."""
        self.args = None
        idle = [link for link in self.crossing.links if link not in self.asked]
        if idle:
            self.crossing.owner.garbage.abandon(idle, self.id)
        self.release()

    def release_backward(self) -> None:
        backward, self.backward = self.backward, None
        if backward is not None and backward.relay is None:
            self.crossing.owner.retire(backward.room, self.stream, backward.pending())

    def __del__(self) -> None:
        if self.room is not None and self.crossing.grad:
            self.crossing.owner.garbage.abandon(self.crossing.links, self.id)
        self.release()


@dataclass(eq=False)
class BackwardWork:
    """A backward under way: its slot, who does what, and the number that their counters will reach.

    relay: whose slot it is, and whose step, if so.
    """

    room: Room
    gathering: Gathering
    sequence: int
    done: bool = False
    relay: Relay | None = None

    def pending(self) -> list[tuple[int, int]]:
        return [] if self.done else [(counter, self.sequence) for counter in self.gathering.done]
