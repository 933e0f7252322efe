"""Runs jobs on slots: the one piece that computes a branch, in a worker and in the lead's stand-in alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpsrun.device import Chunk, Device
from mpsrun.device.arena import Room
from mpsrun.errors import MpsrunError
from mpsrun.graph.program import Program, State, build
from mpsrun.graph.state import applied
from mpsrun.run import compiling
from mpsrun.wire.messages import Backward, Forward, Place, Prepare, Rng, Slot


@dataclass(eq=False)
class Job:
    """A program with its parameters and buffers bound.

    Buffers that the program writes are worked on in a private copy, whose new values go into the slot: a job has no
    side effect, so that it can be run again by somebody else. unbound: why the tensors that it was bound to are gone,
    if they are.
    """

    program: Program
    function: Callable[..., Sequence[torch.Tensor]]
    statics: dict[int, torch.Tensor] = field(default_factory=dict)
    private: dict[int, torch.Tensor] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)
    unbound: str | None = None

    def fixed(self) -> Job:
        """The same job, which is not bound to anything else later; its leaves are its own.

        Autograd has the gradient of a leaf end on the stream on which the leaf was first used. Raises `MpsrunError`
        where the job is bound to nothing.
        """
        if self.unbound is not None:
            raise MpsrunError(f"expected the parameters of a job, found them gone: {self.unbound}")
        job = Job(self.program, self.function)
        job.bind({i: t.detach().requires_grad_(t.requires_grad) for i, t in self.statics.items()})
        return job

    def bind(self, statics: dict[int, torch.Tensor]) -> None:
        """Use these tensors, by input index; a parameter that wants a gradient is a leaf with `requires_grad`."""
        self.statics, self.unbound = statics, None
        self.private = {i: statics[i].detach().clone() for i in self.program.writes}
        self.values = [self.private.get(i, statics.get(i)) for i in range(len(self.program.inputs))]

    def unbind(self, reason: str) -> None:
        """Its tensors are gone: it cannot run before it is bound again."""
        self.statics, self.private, self.values, self.unbound = {}, {}, [], reason


@dataclass(eq=False)
class _Saved:
    """What a forward leaves for its backward: the leaves by input index, and the outputs."""

    leaves: dict[int, torch.Tensor]
    outputs: Sequence[torch.Tensor]


class Executor:
    """Forward and backward of jobs, reading from and writing to slots.

    It neither waits nor signals: who calls it knows the order.
    """

    def __init__(self, device: Device, chunk: Callable[[int], Chunk]) -> None:
        self._device = device
        self._chunk = chunk
        self._rooms: dict[tuple[int, int], Room] = {}
        self._saved: dict[tuple[int, int], _Saved] = {}  # by invocation and job
        self._offsets: tuple[int, ...] = ()
        self._generator = torch.cuda.default_generators[device.index] if device.kind == "cuda" else None  # type: ignore[attr-defined]
        self.jobs: dict[int, Job] = {}
        self.layouts: dict[int, Prepare] = {}

    def load(self, job: int, program: Program) -> None:
        self.jobs[job] = Job(program, build(program, seek=self._seek))

    def forget(self, layouts: Sequence[int], jobs: Sequence[int]) -> None:
        for layout in layouts:
            self.layouts.pop(layout, None)
        for job in jobs:
            self.jobs.pop(job, None)

    def forward(self, message: Forward, write: bool = True, job: Job | None = None) -> None:
        """Compute a job's outputs and the new values of its buffers into the slot.

        `write=False` leaves the slot alone: a forward done again for its backward, when the outputs are in use.
        job: that of the layout as it was `fixed`.
        """
        layout = self.layouts[message.layout]
        job = job or self.jobs[layout.job]
        inputs = self._views(message.slot, layout, "inputs", layout.inputs)
        rng = message.rngs[layout.position] if message.rngs else None
        outputs, leaves = self._compute(layout, job, inputs, message.state, rng)
        if layout.grad and any(output.requires_grad for output in outputs):
            self._saved[message.invocation, layout.job] = _Saved(leaves, outputs)
        if not write:
            return
        targets = self._views(message.slot, layout, "outputs", layout.outputs)
        results = [output.detach() for output in outputs]
        if layout.writes:
            targets = targets + self._views(message.slot, layout, "writes", layout.writes)
            results += [job.private[place.index] for place in layout.writes]
        copy_all(targets, results)

    def _compute(
        self, layout: Prepare, job: Job, inputs: Sequence[torch.Tensor], state: State, rng: Rng | None
    ) -> tuple[Sequence[torch.Tensor], dict[int, torch.Tensor]]:
        values = _arguments(layout, job, inputs)
        if job.private:
            # Through `.data`: autograd may have saved the private copy, and may rely on it having one version.
            copy_all([t.data for t in job.private.values()], [job.statics[i].detach() for i in job.private])
        self._offsets = rng.offsets if rng is not None else ()
        if rng is not None and self._generator is not None and self._generator.initial_seed() != rng.seed:
            self._generator.manual_seed(rng.seed)
        with applied(state):
            outputs = job.function(*values)
        return outputs, {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.requires_grad}

    def backward(self, message: Backward) -> None:
        """Compute the gradients that are asked for into the slot; zeros where a gradient turns out not to exist."""
        layout = self.layouts[message.layout]
        task, key = message.tasks[layout.position], (message.invocation, layout.job)
        saved = self._saved[key] if message.keep else self._saved.pop(key)
        incoming = self._views(message.slot, layout, "grad_outputs", layout.grad_outputs)
        outgoing = self._views(message.slot, layout, "grad_inputs", layout.grad_inputs)
        by_index = {place.index: view for place, view in zip(layout.grad_inputs, outgoing, strict=True)}
        gradients = _grad(
            [saved.outputs[i] for i in task.outputs],
            [saved.leaves[i] for i in task.inputs],
            [incoming[i] for i in task.outputs],
            message.keep,
        )
        targets = [by_index[i] for i in task.inputs]
        for target, gradient in zip(targets, gradients, strict=True):
            if gradient is None:
                target.zero_()
        found = [(t, g) for t, g in zip(targets, gradients, strict=True) if g is not None]
        copy_all([t for t, _ in found], [g for _, g in found])

    def spoil(self, message: Forward | Backward) -> None:
        """Fill what a message asked for with NaN: work that failed must not pass for done."""
        layout = self.layouts[message.layout]
        part = "outputs" if isinstance(message, Forward) else "grad_inputs"
        places = layout.outputs if isinstance(message, Forward) else layout.grad_inputs
        with torch.no_grad():
            for view in self._views(message.slot, layout, part, places):
                if view.is_floating_point():
                    view.fill_(torch.nan)

    @property
    def kept(self) -> int:
        """How many forwards wait for their backward."""
        return len(self._saved)

    def has(self, message: Backward) -> bool:
        """Whether the forward left what this backward needs."""
        return (message.invocation, self.layouts[message.layout].job) in self._saved

    def drop(self, invocations: Sequence[int]) -> None:
        gone = frozenset(invocations)
        for key in [key for key in self._saved if key[0] in gone]:
            del self._saved[key]

    def compile(self, message: Prepare) -> str | None:
        """Have Inductor compile a layout's job, and run it once; returns why the job stays as it is, if so."""
        job = self.jobs[message.job]
        plain = job.function
        try:
            with compiling.settings():
                values = _arguments(message, job, [_zeros(place, self._device) for place in message.inputs])
                with applied(message.state):
                    job.function = compiling.compiled(plain, values, len(message.outputs), self._device.kind)
                self.warm_up(message)
        except Exception as error:  # noqa: BLE001 - whatever a compiler may raise, the job can do without
            job.function = plain
            return compiling.reason(error)
        return None

    def warm_up(self, message: Prepare) -> None:
        """Run a layout once on zeros: loads kernels and fills the allocator before anybody waits for it."""
        inputs = [_zeros(place, self._device) for place in message.inputs]
        outputs, leaves = self._compute(message, self.jobs[message.job], inputs, message.state, None)
        wanted = [leaves[place.index] for place in message.grad_inputs]
        differentiable = [output for output in outputs if output.requires_grad]
        if message.grad and wanted and differentiable:
            ones = [torch.ones_like(output) for output in differentiable]
            _grad(differentiable, wanted, ones, keep=False)
        self._device.synchronize()

    def _views(self, slot: Slot, layout: Prepare, part: str, places: Sequence[Place]) -> list[torch.Tensor]:
        key = (slot.chunk, slot.offset_bytes)
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = Room(self._chunk(slot.chunk), slot.offset_bytes, 0)
        return room.tensors(layout.job, part, [place.tensor for place in places])

    def _seek(self, ordinal: int) -> None:
        if self._generator is not None and self._offsets:
            self._generator.set_offset(self._offsets[ordinal])


def _arguments(layout: Prepare, job: Job, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """What a job is called with: `inputs` in their places, as leaves."""
    if job.unbound is not None:
        raise MpsrunError(f"expected the parameters of job {layout.job}, found them gone: {job.unbound}")
    values = list(job.values)
    for place, tensor in zip(layout.inputs, inputs, strict=True):
        values[place.index] = tensor.detach().requires_grad_(place.requires_grad)
    for index, number in layout.ints.items():
        values[index] = number
    return values


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target: one launch a dtype for many small tensors on a GPU.

    Nothing is recorded: sources that require a gradient are for callers under `no_grad`.
    """
    if len(targets) == 1:
        targets[0].copy_(sources[0])
        return
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault(target.dtype, ([], []))
        group[0].append(target)
        group[1].append(source)
    for some, others in groups.values():
        torch._foreach_copy_(some, others)


def _grad(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients, computed in the calling thread: autograd's own would only cost a switch to it and back."""
    with torch.autograd.set_multithreading_enabled(False):
        return torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep, allow_unused=True)


def _zeros(place: Place, device: Device) -> torch.Tensor:
    ref = place.tensor
    tensor = torch.empty_strided(ref.shape, ref.stride, dtype=getattr(torch, ref.dtype), device=device.where)
    return tensor.zero_()
