"""Times of each branch alone: the network's own parameters, made-up activations, and no trace left behind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec
import torch
from torch import fx

from mpsrun.errors import NotShippable, in_a_line
from mpsrun.graph.effects import Effects
from mpsrun.graph.program import build, extract
from mpsrun.graph.regions import Branch, Region
from mpsrun.graph.state import State, applied
from mpsrun.plan.cost import Costs
from mpsrun.run import demand, philox
from mpsrun.run import state as modes
from mpsrun.run.demand import Demand
from mpsrun.run.layout import TensorMeta
from mpsrun.run.observe import Observation
from mpsrun.run.recorder import settle

RUNS = 3  # after one that warms up
LIMIT_S = 5.0


@dataclass(frozen=True)
class Alone:
    """Medians of a branch that runs alone; `backward_us` is 0 where nothing is differentiated.

    peak_bytes: of the device's memory beyond its inputs; demand: what its kernels take. Both None on a CPU, and where
    they were not asked for.
    """

    forward_us: float
    backward_us: float
    peak_bytes: int | None = None
    demand: Demand | None = None

    @property
    def us(self) -> float:
        return self.forward_us + self.backward_us


@dataclass(frozen=True)
class NotMeasured:
    """A branch without times, and why."""

    reason: str


Times: TypeAlias = Mapping[int, Sequence[Alone | NotMeasured]]  # by region index, those of its branches


def measured_us(times: Times) -> dict[int, tuple[float, ...]]:
    """What `Costs` takes: the regions of which every branch was measured."""
    return _whole(times, lambda alone: alone.us)


def kernels_us(times: Times) -> dict[int, tuple[float, ...]]:
    """The same of kernels alone, without the time that launching them takes."""
    return _whole(times, lambda alone: alone.demand.kernel_us if alone.demand is not None else None)


def _whole(times: Times, us_of: Callable[[Alone], float | None]) -> dict[int, tuple[float, ...]]:
    found = {}
    for index, branches in times.items():
        known = [us_of(branch) for branch in branches if isinstance(branch, Alone)]
        told = tuple(us for us in known if us is not None)
        if len(told) == len(branches):
            found[index] = told
    return found


@dataclass(frozen=True, eq=False)
class Step:
    """Forward and backward of one branch, on inputs of its own; called, it does both on the current stream."""

    function: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Sequence[Any]
    state: State

    def forward(self) -> tuple[torch.Tensor, ...]:
        with applied(self.state):
            return self.function(*self.inputs)

    @property
    def _wanted(self) -> list[torch.Tensor]:
        return [x for x in self.inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def ends(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs that backward starts from; none where no input wants a gradient."""
        return [output for output in outputs if output.requires_grad] if self._wanted else []

    def backward(self, ends: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        torch.autograd.grad(ends, self._wanted, gradients, allow_unused=True)

    def __call__(self) -> None:
        ends = self.ends(self.forward())
        if ends:
            self.backward(ends, [torch.ones_like(end) for end in ends])


class Profiler:
    """Runs the branches of one graph alone, under the modes of the calling thread.

    values: what the graph was called with, by placeholder. in_detail: measure memory, too, which starts the peak of the
    process's own statistics anew, and the demand of its kernels, which starts a profiler.
    """

    def __init__(
        self, effects: Effects, seen: Observation, values: Mapping[fx.Node, Any], kind: str, in_detail: bool = False
    ) -> None:
        self._effects, self._seen, self._values = effects, seen, values
        self._kind, self._in_detail = kind, in_detail and kind == "cuda"
        # Casts that the caller's autocast keeps would be made once, and for the caller to keep.
        self._state = msgspec.structs.replace(modes.ambient(kind), cache=False)

    def times(self, regions: Sequence[Region], costs: Costs) -> Times:
        """All branches, unless that is estimated to take longer than `LIMIT_S`; none starts later than that."""
        estimate_s = sum(map(costs.serial_us, regions)) * (RUNS + 1) / 1e6
        if estimate_s > LIMIT_S:
            reason = NotMeasured(f"all branches alone would take {estimate_s:.0f} s")
            return {region.index: [reason] * len(region.branches) for region in regions}
        deadline_s = time.monotonic() + LIMIT_S
        with undisturbed(self._kind):
            times = {
                region.index: [self._alone(branch, deadline_s) for branch in region.branches] for region in regions
            }
            return self._with_demands(regions, times) if self._in_detail else times

    def _alone(self, branch: Branch, deadline_s: float) -> Alone | NotMeasured:
        if time.monotonic() > deadline_s:
            return NotMeasured(f"the branches before it took {LIMIT_S:.0f} s")
        try:
            run = self._runnable(branch)
            peak_bytes = self._peak_bytes(run) if self._in_detail else None
            run()
            forward_us, backward_us = zip(*(run() for _ in range(RUNS)), strict=True)
        except NotShippable as error:
            return NotMeasured(str(error))
        except Exception as error:  # noqa: BLE001 - values made up may be none that its ops take
            return NotMeasured(in_a_line(error))
        return Alone(statistics.median(forward_us), statistics.median(backward_us), peak_bytes)

    def _with_demands(self, regions: Sequence[Region], times: Times) -> Times:
        """The same with the demand of those that could be timed, as far as the profiler can say."""
        pairs = [pair for region in regions for pair in zip(region.branches, times[region.index], strict=True)]
        timed = [branch for branch, alone in pairs if isinstance(alone, Alone)]
        demands: Sequence[Demand | None] = demand.measure(map(self._runnable, timed)) or [None] * len(timed)
        found = iter(demands)
        return {
            index: [replace(one, demand=next(found)) if isinstance(one, Alone) else one for one in branches]
            for index, branches in times.items()
        }

    def _runnable(self, branch: Branch) -> Callable[[], tuple[float, float]]:
        step, kind = self.step(branch), self._kind

        def run() -> tuple[float, float]:
            start = _mark(kind)
            outputs = step.forward()
            forward_us = _us_since(start)
            ends = step.ends(outputs)
            if not ends:
                return forward_us, 0.0
            ones = [torch.ones_like(output) for output in ends]
            start = _mark(kind)
            step.backward(ends, ones)
            return forward_us, _us_since(start)

        return run

    def step(self, branch: Branch) -> Step:
        """One branch by itself, ready to run. Raises `NotShippable` where its inputs are not known."""
        program, outside = extract(branch.nodes, self._effects, branch.outputs)
        with torch.no_grad():
            inputs = [self._input(node, i in program.writes) for i, node in enumerate(outside)]
        return Step(build(program), inputs, self._state)

    def _input(self, node: fx.Node, written: bool) -> Any:
        """A leaf of its own in the place of an input; memory that the branch writes is copied."""
        value, meta = self._values.get(node), self._seen.metas.get(node)
        if isinstance(value, torch.Tensor):
            made = value.detach().clone() if written else value.detach()
            return made.requires_grad_(value.requires_grad and not value.is_inference())
        if isinstance(meta, TensorMeta):
            return _made_up(meta)
        if meta is None:
            raise NotShippable(f"the value of {node.name} was not seen")
        return meta

    @staticmethod
    def _peak_bytes(run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before_bytes


def _made_up(meta: TensorMeta) -> torch.Tensor:
    """Between 0 and 1 where it is floating: this is a probability, has a logarithm, and is cut off to the index 0."""
    last = sum((extent - 1) * stride for extent, stride in zip(meta.shape, meta.stride, strict=True))
    count = 0 if 0 in meta.shape else last + 1
    flat = torch.zeros(count, dtype=meta.dtype, device=meta.device)
    if meta.dtype.is_floating_point or meta.dtype.is_complex:
        source = torch.Generator(device=meta.device)
        flat.copy_(torch.rand(count, device=meta.device, generator=source))
    return flat.as_strided(meta.shape, meta.stride).requires_grad_(meta.requires_grad)


@contextmanager
def undisturbed(kind: str) -> Iterator[None]:
    """Outside of inference mode, in which nothing could require gradients, and with the generators put back."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), philox.undisturbed(kind):
        yield


def _mark(kind: str) -> Any:
    """A moment at which nothing is under way."""
    if kind != "cuda":
        return time.perf_counter()
    settle()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _us_since(start: Any) -> float:
    if isinstance(start, float):
        return (time.perf_counter() - start) * 1e6
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
