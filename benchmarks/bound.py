"""How fast a training step of a network could be at best on this GPU, however its branches are run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.steps import FEW_STEPS, Stepper, device
from mpsrun.plan.bound import Bound, bound
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.run import demand, explain
from mpsrun.run.demand import Demand
from mpsrun.run.examine import Network
from mpsrun.run.profile import NotMeasured, kernels_us, measured_us


def measure(case: Case, model: nn.Module) -> dict[str, Any]:
    """The larger of two times, in ms: along the critical path, and with all multiprocessors full.

    On a GPU both are made of the durations of the kernels of plain PyTorch, each run alone; copies, launches, DRAM and
    L2 are left out. On a CPU there is wall time only, and no second time. Raises RuntimeError where a branch could not
    be measured.
    """
    step = _whole_step(case, model)
    parts = [_critical(network) for network in _networks(case, model)]
    critical_us = sum(part.critical_us for part in parts)
    outside_us = max(0.0, step.kernel_us - sum(part.serial_us for part in parts))
    path_us = min(step.kernel_us, outside_us + critical_us)  # alone a branch may be slower than in a step
    row = {"ms": max(path_us, step.full_us), "critical path ms": path_us, "one after the other ms": step.kernel_us}
    if device() == "cuda":
        row["full GPU ms"] = step.full_us
    return {name: round(us / 1e3, 3) for name, us in row.items()}


def _whole_step(case: Case, model: nn.Module) -> Demand:
    """All kernels of a step, from the copied batch to the cleared gradients."""
    stepper = Stepper(case, model, "eager")
    stepper.time_steps(FEW_STEPS)
    if device() == "cpu":
        return Demand(statistics.median(_wall_us(stepper) for _ in range(FEW_STEPS)), 0.0)
    found = demand.measure([lambda: stepper.time_steps(1)])
    if found is None or not found[0].kernel_us:
        raise RuntimeError("expected torch's profiler to tell of the kernels of a step, found none")
    return found[0]


def _wall_us(stepper: Stepper) -> float:
    start = time.perf_counter()
    stepper.time_steps(1)
    return (time.perf_counter() - start) * 1e6


def _networks(case: Case, model: nn.Module) -> list[Network]:
    own = copy.deepcopy(model).to(device())
    inputs = tuple(given.to(device()) for given in case.make_inputs())
    with torch.autocast(device(), torch.bfloat16, enabled=case.of.bf16):
        return explain.networks(own, inputs)


def _critical(network: Network) -> Bound:
    us = kernels_us(network.times) if network.kind == "cuda" else measured_us(network.times)
    missing = [index for index in network.times if index not in us]
    if missing:
        raise RuntimeError(f"expected times of all branches, found none of some: {_reason(network, missing)}")
    return bound(network.regions, Costs(MACHINES.get(network.kind, MACHINES["cpu"]), us))


def _reason(network: Network, missing: Sequence[int]) -> str:
    reasons = [one.reason for index in missing for one in network.times[index] if isinstance(one, NotMeasured)]
    return reasons[0] if reasons else "the profiler told of no kernels"
