"""What a captured step costs the lead, beside what any such step would cost it.

Four sides: the step as it is; the same with recordings that submit nothing, which leaves mpsrun's own Python and what
it asks of torch; and the least that a compiled step can be, Dynamo's guards around an autograd function that hands out
the same outputs and gradients in every step, which AccumulateGrad then takes: in autograd's own thread, as PyTorch does
it, and in the thread that called it, as mpsrun has it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from benchmarks.cases import Case
from benchmarks.steps import Stepper, spread, synchronize
from mpsrun.run import variant
from mpsrun.run.recorder import Function, Recorder, Recording, recorder

STEPS = 60


def captured_host(case: Case, repeats: int, steps: int = STEPS) -> dict[str, Any]:
    """Microseconds until a captured training step is submitted, and how many of them are mpsrun's own.

    Raises RuntimeError where the network cannot be captured.
    """
    model = case.of.make()
    quiet = Quiet()
    with mock.patch.object(variant, "recorder", quiet.around):
        captured = Stepper(case, model, "mpsrun captured")
        captured.warm_up()
    if not quiet.recordings:
        raise RuntimeError(f"expected {case.name} to be captured; mpsrun's messages say why it was not")
    least, here = (Least(case, model, in_calling_thread) for in_calling_thread in (False, True))
    for stepper in (least, here):
        stepper.warm_up()
    sides = {
        "captured": captured,
        "without its replays": captured,
        "guards and AccumulateGrad alone": least,
        "these in the calling thread": here,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, stepper in sides.items():
            quiet.submits = name == "captured"
            times[name].append(lead_us(stepper, steps))
    quiet.submits = True
    row: dict[str, Any] = {"part": f"lead's time for a captured step of {case.name}, us"}
    row |= {name: spread(values, 1) for name, values in times.items()}
    row["parameters"] = sum(1 for _ in model.parameters())
    row["beyond them"] = round(row["without its replays"][0] - row["these in the calling thread"][0], 1)
    return row


def lead_us(stepper: Stepper, steps: int) -> float:
    """Microseconds until a step is submitted, with an idle GPU before each: the median of many."""
    spent = []
    for _ in range(steps):
        synchronize()
        start = time.perf_counter()
        stepper.step()
        spent.append(time.perf_counter() - start)
        stepper.clear()
    return statistics.median(spent) * 1e6


class Quiet:
    """Recorders whose recordings can be told to submit nothing; they return what they last computed.

    submits: whether they do. recordings: how many were made.
    """

    def __init__(self) -> None:
        self.submits = True
        self.recordings = 0

    def around(self, device: torch.device) -> Recorder:
        return _QuietRecorder(self, recorder(device))


class _QuietRecorder:
    def __init__(self, quiet: Quiet, real: Recorder) -> None:
        self._quiet, self._real = quiet, real

    @property
    def era(self) -> Any:
        return self._real.era

    @property
    def has_workers(self) -> bool:
        return self._real.has_workers

    def make_room(self) -> None:
        self._real.make_room()

    def follow(self) -> None:
        self._real.follow()

    def record(self, function: Function, forward: Recording | None = None) -> Recording:
        self._quiet.recordings += 1
        real = forward.real if isinstance(forward, _QuietRecording) else None
        return _QuietRecording(self._quiet, self._real.record(function, real))


class _QuietRecording:
    def __init__(self, quiet: Quiet, real: Recording) -> None:
        self.real = real
        self._quiet = quiet
        self._results: Any = None

    def replay(self) -> Any:
        if self._quiet.submits or self._results is None:
            self._results = self.real.replay()
        return self._results


class Least(Stepper):
    """Steps that compute nothing of their network after the first; backward may come in the calling thread."""

    def __init__(self, case: Case, model: nn.Module, in_calling_thread: bool) -> None:
        super().__init__(case, model, "eager")
        backend = functools.partial(constant, in_calling_thread)
        self._call = torch.compile(self.model, backend=backend)


def constant(in_calling_thread: bool, gm: fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: outputs and gradients are those of the first call, whatever the arguments."""
    places: list[int] = []
    kept: list[Kept] = []

    def call(*args: Any) -> Any:
        torch.autograd.set_multithreading_enabled(not in_calling_thread)
        if not kept:
            places.extend(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad)
            kept.append(Kept(gm(*args), [args[i] for i in places]))
        return _Constant.apply(kept[0], *[args[i] for i in places])

    return call


class Kept:
    """The results of a graph and the gradients of the sum of them."""

    def __init__(self, outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
        self.gradients = torch.autograd.grad(sum(o.sum() for o in outputs), wanted, allow_unused=True)
        self.outputs = [output.detach() for output in outputs]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Kept, *_wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.kept = kept
        return tuple(output.detach() for output in kept.outputs)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor | None) -> tuple[Any, ...]:
        # Fresh tensors, which AccumulateGrad takes as they are.
        return None, *[None if g is None else g.detach() for g in ctx.kept.gradients]
