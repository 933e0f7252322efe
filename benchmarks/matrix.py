"""One row of the matrix: every engine on one network and batch, in turns, and what each of them computes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import bound, memory
from benchmarks.cases import Case
from benchmarks.engines import AUTO, FORCED, WITH_WORKERS
from benchmarks.judge import judge
from benchmarks.steps import FEW_STEPS, Stepper, device, spread
from mpsrun.run import in_place, session

Cells = dict[str, dict[str, Any]]

# Engines compile the same code, and each of them counts towards Dynamo's limit: beyond it a network would silently
# run eagerly.
DYNAMO = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}


def measure(case: Case, engines: Sequence[str], repeats: int, steps: int, compared: Sequence[str]) -> dict[str, Any]:
    """Time all engines and compare the results of some; an engine that fails has the reason instead."""
    model = make(case)
    cells: Cells = {engine: {} for engine in engines}
    with dynamo():
        time_engines(case, model, cells, repeats, steps)
        forget()
        compare(case, model, {engine: cells[engine] for engine in engines if engine in compared})
        forget()
    narrow = "tf32" if device() == "cuda" else "fp32"
    row = {"network": case.network, "batch": case.batch, "dtype": "bf16" if case.of.bf16 else narrow, "engines": cells}
    lost = lost_workers()
    return row | judge(row) | ({"lost": lost} if lost else {})


def dynamo() -> contextlib.AbstractContextManager[None]:
    """Dynamo's settings for engines, and those from before afterwards: `auto` changes some."""
    as_it_is = {name: getattr(torch._dynamo.config, name) for name in in_place.CHANGED}
    patch: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(as_it_is | DYNAMO)
    return patch


def find_bound(case: Case) -> dict[str, Any]:
    """How fast a step could be at best, or why that is not known."""
    found: dict[str, Any] = {}
    with torch._dynamo.config.patch(DYNAMO), _failing_into(found):
        found |= bound.measure(case, make(case))
    forget()
    return found


def make(case: Case) -> nn.Module:
    """The network, the same each time."""
    torch.manual_seed(0)
    return case.of.make()


def time_engines(case: Case, model: nn.Module, cells: Cells, repeats: int, steps: int) -> None:
    """Fill in milliseconds a step and memory.

    Engines take turns, so that drift of the machine meets all alike, each turn in another order: what one leaves behind
    in caches meets all alike, too.
    """
    steppers: dict[str, Stepper] = {}
    for engine, cell in cells.items():
        with _failing_into(cell):
            steppers[engine] = _set_up(case, model, engine, cell)
    turns = []
    for number in range(repeats):
        order = [*steppers]
        shift = number % max(1, len(order))
        turns.append(_turn(steppers, order[shift:] + order[:shift], cells, steps))
    for engine in steppers:
        cells[engine]["ms"] = spread([turn[engine] for turn in turns])
        set_up = cells[engine]["set-up"]
        set_up["extra s"] = round(set_up["s"] - set_up["steps"] * cells[engine]["ms"][0] / 1e3, 2)


def _turn(steppers: dict[str, Stepper], order: Sequence[str], cells: Cells, steps: int) -> dict[str, float]:
    """Milliseconds a step by engine, after a few that are not timed; one that fails takes no further part."""
    times: dict[str, float] = {}
    for engine in order:
        with _failing_into(cells[engine]):
            steppers[engine].time_steps(FEW_STEPS)
            times[engine] = steppers[engine].time_steps(steps)
        if "failed" in cells[engine]:
            del steppers[engine]
    return times


def _set_up(case: Case, model: nn.Module, engine: str, cell: dict[str, Any]) -> Stepper:
    source = memory.allocator()
    meter = memory.Meter(source) if source is not None else None
    stepper = Stepper(case, model, engine)
    cell["set-up"] = {"s": round(stepper.warm_up(), 2), "steps": stepper.warm_up_steps}
    if engine in FORCED:
        ran = [region for graph in stepper.graphs for region in graph.regions if region.calls]
        cell["regions on lanes"] = len(ran)
    if engine == AUTO:
        cell["plans"] = [plan for graph in stepper.graphs for plan in graph.chosen.values()]
    if meter is not None:
        cell["memory"] = meter.measure(lambda: stepper.time_steps(FEW_STEPS), engine in WITH_WORKERS)
    return stepper


def compare(case: Case, model: nn.Module, cells: Cells) -> None:
    """Fill in how far loss and gradients are from eager's, with TF32 off and the same algorithms of cuDNN.

    Where that cannot be found out, the reason stands in its place, and the engine keeps its times.
    """
    wanted = [engine for engine, cell in cells.items() if engine != "eager" and "failed" not in cell]
    if not wanted:
        return
    plain: list[Tensor] = []
    why: dict[str, Any] = {}
    with _exact():
        with _failing_into(why):
            plain = _results(case, model, "eager")
        for engine in wanted:
            found = cells[engine]["deviation"] = {**why}
            if not why:
                with _failing_into(found):
                    found |= deviation(plain, _results(case, model, engine))


def _results(case: Case, model: nn.Module, engine: str) -> list[Tensor]:
    """The loss and all gradients of one step after the warm-up, from the same parameters and buffers."""
    stepper = Stepper(case, model, engine)
    stepper.warm_up()
    stepper.model.load_state_dict(model.state_dict())
    loss = stepper.step()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in stepper.model.parameters()]
    return [loss, *gradients]


def deviation(plain: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Relative differences of the loss and of all gradients together (in the norm)."""
    loss = (abs(plain[0] - other[0]) / abs(plain[0])).item()
    difference = torch.stack([(a - b).norm() for a, b in zip(plain[1:], other[1:], strict=True)]).norm()
    total = torch.stack([a.norm() for a in plain[1:]]).norm()
    return {"loss": loss, "gradients": (difference / total).item()}


def lost_workers() -> list[str]:
    """The workers that failed, with the reasons; what is measured without them is not what it says."""
    owner = session.current()
    links = owner.links if owner is not None else []
    return [f"worker {link.index} was lost: {link.lost}" for link in links if link.lost is not None]


def forget() -> None:
    """Give back what compiled networks and dead tensors hold."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _failing_into(cell: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - that an engine fails is a result
        cause = getattr(error, "inner_exception", error)  # what Dynamo wraps
        lines = str(cause).strip().splitlines() or [""]
        cell["failed"] = f"{type(cause).__name__}: {lines[0]}"[:200]


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """TF32 off, and no search for cuDNN's algorithms, which would find another one for each engine."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = ((matmul, "allow_tf32"), (cudnn, "allow_tf32"), (cudnn, "benchmark"))
    before = [getattr(owner, name) for owner, name in settings]
    for owner, name in settings:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
