"""Trains one network of the zoo plainly and on lanes, step by step, and compares all that a script can see."""

from __future__ import annotations

import copy
import gc
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from benchmarks import zoo_rows as rows
from benchmarks.zoo_models import Entry, Specimen, specimen
from mpsrun.plan.candidates import GOES_ALONG
from mpsrun.run import backend, in_place, report, session

WORKERS = 2
STEPS = 3
# In float64 rounding is 1e-16, and the largest deviation seen was 3e-9 (an untrained DeepLab of 101 layers), mostly
# below 1e-10. The same factor of 1e5 makes some 1e-2 of float32's 6e-8: an estimate, and a weak test.
TOLERANCE = {"float64": 1e-6, "float32": 2e-2}
# A gradient that is zero but for rounding (a bias before BatchNorm) is measured against its step's largest.
FLOOR = {"float64": 1e-6, "float32": 1e-3}
COMPARISON = f"""one step in which mpsrun only looks, then {STEPS} steps on lanes ({WORKERS} workers, one thread each,
CPU, batch 2 but 1 of videos and flow, SGD with clipped gradients, constant parameters shaken, same seed before each
forward): outputs, gradients of inputs and parameters, parameters and buffers after the optimizer, strides, and the
state of the random generator.

A deviation is the largest difference within a tensor, relative to its largest entry, or to {FLOOR["float64"]:g} of the
largest entry of its kind (output, gradient, state) where that is more. Networks run in float64, so that rounding
cannot be taken for a fault: at most {TOLERANCE["float64"]:g} is allowed. Very large ones, and
those that plain PyTorch cannot run in float64, run in float32 (of the largest
{FLOOR["float32"]:g}, at most {TOLERANCE["float32"]:g}).

Some untrained networks on small images are *chaotic*: BatchNorm over two pictures of one pixel each turns rounding into
large differences. A difference beyond what is allowed counts as one of these only where plain PyTorch, with one bit of
noise in its weights, differs from itself by no less in as many steps."""


class Watched:
    """The backend, with its graphs and its failures kept; Dynamo would hide the latter."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.failures: list[str] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        try:
            graph = backend.mpsrun(gm, inputs, **options)
        except Exception:
            self.failures.append(last_lines(traceback.format_exc()))
            raise
        if isinstance(graph, backend.Graph):
            self.found += [len(region.branches) for region in graph._regions]
        return graph


@dataclass
class Worst:
    """The largest deviation so far, the tensor it is in, and the first difference beyond the tolerance."""

    tolerance: float
    floor: float
    deviation: float = 0.0
    name: str = ""
    wrong: str = ""

    def take(self, name: str, deviation: float) -> None:
        if deviation > self.deviation or not self.name:
            self.deviation, self.name = deviation, name
        if not deviation <= self.tolerance:
            self.differ(f"{name} by {deviation:.1e}")

    def differ(self, what: str) -> None:
        self.wrong = self.wrong or what


def measure(entry: Entry, steps: int = STEPS) -> rows.Row:
    """The row of a model; failures of plain PyTorch and of mpsrun are rows, too."""
    start = time.monotonic()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    row = rows.Row(entry.name, entry.family, rows.SAME, versions=versions)
    try:
        found = specimen(entry)
    except Exception as error:  # noqa: BLE001
        return replace(row, result=rows.PLAIN_FAILS, detail=short(error), seconds=time.monotonic() - start)
    row = replace(row, px=found.px, dtype=found.dtype, parameters=_size(found.model))
    watched, untouched = Watched(), copy.deepcopy(found.model)
    try:
        row = _compared(row, found, watched, steps)
        if row.result == rows.DIFFERS:
            row = _judged(row, replace(found, model=untouched), steps)
    except Exception:  # noqa: BLE001
        row = replace(row, result=rows.CRASH, detail=last_lines(traceback.format_exc()))
    finally:
        _forget()
    return replace(row, seconds=round(time.monotonic() - start, 1))


def _judged(row: rows.Row, found: Specimen, steps: int) -> rows.Row:
    """A difference is no fault where plain PyTorch turns one bit of its weights into one that is no smaller."""
    if row.deviation is None or row.deviation <= TOLERANCE[found.dtype]:  # something else is wrong
        return row
    noisy = copy.deepcopy(found.model)
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape, device=p.device).to(p.dtype))
    worst = Worst(TOLERANCE[found.dtype], FLOOR[found.dtype])
    for step in range(1 + steps):
        _step(found.model, noisy, found.inputs, step, worst)
    if worst.deviation < row.deviation:
        return row
    noise = f"one bit of noise in the weights of plain PyTorch makes {worst.deviation:.0e}"
    return replace(row, result=rows.CHAOTIC, detail=noise)


def _compared(row: rows.Row, found: Specimen, watched: Watched, steps: int) -> rows.Row:
    report.graphs.clear()
    in_place.prepare_dynamo()
    plain, fast = found.model, copy.deepcopy(found.model)
    fast.compile(backend=watched, options={"lanes": "workers", "workers": WORKERS})
    worst = Worst(TOLERANCE[found.dtype], FLOOR[found.dtype])
    for step in range(1 + steps):
        _step(plain, fast, found.inputs, step, worst)
    row = replace(row, deviation=worst.deviation, worst=worst.name, **_told(watched))
    wrong = _wrong(watched, worst, row)
    return replace(row, result=wrong[0], detail=wrong[1])


def _wrong(watched: Watched, worst: Worst, row: rows.Row) -> tuple[str, str]:
    """The result, and what to say about it."""
    if watched.failures:
        return rows.CRASH, watched.failures[0]
    coordinator = session.current()
    lost = {link.index: link.lost for link in coordinator.links if link.lost} if coordinator else {}
    if lost:
        return rows.CRASH, f"workers lost: {lost}"
    if not worst.wrong and row.forwards != _owed():
        return rows.DIFFERS, f"{row.forwards} executions in workers for {_owed()}"
    return (rows.DIFFERS, worst.wrong) if worst.wrong else (rows.SAME, "")


def _owed() -> int:
    """How many jobs the workers should have run forward."""
    regions = [region for graph in report.graphs for region in graph.regions]
    return sum(region.calls * len({job for job in region.jobs if job}) for region in regions)


def _told(watched: Watched) -> dict[str, Any]:
    """What mpsrun reports of its graphs, and the workers of their jobs."""
    regions = [region for graph in report.graphs for region in graph.regions]
    told = [text for graph in report.graphs for text in graph.refusals]
    refusals = [text for text in told if not any(other in text for other in NO_REFUSALS)]
    jobs = {(lane, job) for region in regions for lane, job in zip(region.lanes, region.jobs, strict=True) if lane}
    coordinator = session.current()
    counts = coordinator.counts() if coordinator else {}
    return {
        "graphs": len(report.graphs),
        "regions": dict(Counter(str(width) for width in watched.found)),
        "lanes": dict(Counter(str(len(region.lanes)) for region in regions if region.calls)),
        "forwards": sum(counts[lane].forwards.get(job, 0) for lane, job in jobs if lane in counts),
        "backwards": sum(counts[lane].backwards.get(job, 0) for lane, job in jobs if lane in counts),
        "refused": dict(Counter(map(reason_of, refusals))),
    }


# What a refusal says beside the lines of the model, which make each one different.
REASONS = (
    "random op on the CPU", "draws random numbers between the branches", "runs between the branches",
    "waits for a value of the device", "writes a tensor in place that its sibling", "is not an op that can run",
    "writes an input of the branch in place", "writes a tensor in place that was made outside",
    "is a view of an input or of another output", "hands out a value that is no tensor",
    "needs a result of its sibling", "both have effects outside tensors",
)  # fmt: skip
NO_REFUSALS = ("no branches that do not depend on each other", GOES_ALONG)


def reason_of(refusal: str) -> str:
    """The part of a refusal that says why; its end where it is none of those known."""
    return next((reason for reason in REASONS if reason in refusal), refusal[-90:])


def _step(plain: nn.Module, fast: nn.Module, inputs: Sequence[Tensor], step: int, worst: Worst) -> None:
    seen = [_forward_backward(model, inputs, step) for model in (plain, fast)]
    (wanted_outputs, wanted_inputs, wanted_random), (outputs, leaves, random) = seen
    where = f"step {step},"
    if len(outputs) != len(wanted_outputs):
        worst.differ(f"{where} {len(outputs)} outputs for {len(wanted_outputs)}")
    _compare("output", where, enumerate(outputs), enumerate(wanted_outputs), worst)
    gradients = [[*enumerate(leaf.grad for leaf in given), *_gradients(model)]
                 for given, model in ((leaves, fast), (wanted_inputs, plain))]  # fmt: skip
    _compare("gradient", where, *gradients, worst)
    if not torch.equal(random, wanted_random):
        worst.differ(f"{where} state of the random generator")
    for model in (plain, fast):
        _descend(model)
    _compare("state", where, fast.state_dict().items(), plain.state_dict().items(), worst)


def _forward_backward(
    model: nn.Module, inputs: Sequence[Tensor], step: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs, inputs with their gradients, and where the random generator stands."""
    torch.manual_seed(step)
    leaves = [(value + 0.01 * torch.randn_like(value)).requires_grad_() for value in inputs]
    model.zero_grad()
    outputs = [value for value in tree_leaves(model(*leaves)) if isinstance(value, Tensor)]
    random = torch.get_rng_state()
    loss_of(outputs).backward()
    return [output.detach() for output in outputs], leaves, random


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A loss in which every element of every output has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            weights = torch.arange(1, output.numel() + 1).cos().view(output.shape)
            total = total + (output * weights.to(output.dtype)).sum() + output.square().mean()
    return total


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    return ((name, parameter.grad) for name, parameter in model.named_parameters())


def _descend(model: nn.Module) -> None:
    """An optimizer step, in place, that keeps untrained networks from running away."""
    gradients = [p for p in model.parameters() if p.grad is not None]
    nn.utils.clip_grad_norm_(gradients, 1.0)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _compare(kind: str, where: str, found: Any, wanted: Any, worst: Worst) -> None:
    """Compare pairs of names and tensors of one kind."""
    pairs = [(name, a, b) for (name, a), (_, b) in zip(found, wanted, strict=True)]
    scales = [_largest(b) for _, _, b in pairs if b is not None and b.is_floating_point()]
    floor = worst.floor * max(scales, default=0.0)
    for name, a, b in pairs:
        label = f"{where} {kind} {name}"
        if a is None or b is None:
            if a is not b:
                worst.differ(f"{label}: {'nothing' if a is None else 'a tensor'} for the opposite")
        elif a.shape != b.shape or a.dtype != b.dtype:
            worst.differ(f"{label}: {a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}")
        elif not b.is_floating_point():
            worst.take(label, 0.0 if torch.equal(a, b) else float("inf"))
        else:
            worst.take(label, _deviation(a, b, floor))
            if a.stride() != b.stride():
                worst.differ(f"{label}: strides {a.stride()} for {b.stride()}")


def _deviation(found: Tensor, wanted: Tensor, floor: float) -> float:
    """The largest difference; infinite where one has NaN and the other has not."""
    if torch.equal(found, wanted):
        return 0.0
    gap = (found - wanted).abs()
    gap[(found == wanted) | (found.isnan() & wanted.isnan())] = 0
    value = gap.max().item() / max(_largest(wanted), floor, 1e-300)
    return float("inf") if math.isnan(value) else value


def _largest(value: Tensor) -> float:
    finite = value[value.isfinite()] if value.numel() else value
    return finite.abs().max().item() if finite.numel() else 0.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _forget() -> None:
    """Leave nothing of a network to the next one."""
    torch._dynamo.reset()
    report.graphs.clear()
    gc.collect()


def short(error: BaseException, limit: int = 160) -> str:
    """The last line of a failure."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return (lines[-1] if len(lines[0]) < 20 else lines[0])[:limit]


_ERROR = re.compile(r"[\w.]+(Error|Exception|Shippable)\b")


def last_lines(trace: str) -> str:
    """The error of a traceback, and the innermost line of mpsrun's that it came through."""
    frames = re.findall(r'File "[^"]*/(mpsrun/[^"]+)", line (\d+)', trace)
    errors = [line for line in trace.strip().splitlines() if _ERROR.match(line)]
    place = f" ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
    return f"{errors[-1][:200] if errors else trace[-200:]}{place}"
