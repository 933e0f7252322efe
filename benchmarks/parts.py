"""What a step is made of: the lead's CPU at a crossing, the GPU-side hand-off, the way to the first step, memory.

And what comes before the step: profiling and trying plans.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import nn

from benchmarks import matrix
from benchmarks.captured_host import lead_us
from benchmarks.cases import Case, Input, Network, chosen
from benchmarks.engines import AUTO
from benchmarks.steps import Stepper, device, spread, synchronize
from mpsrun import config
from mpsrun.device import ChunkHandle, open_device
from mpsrun.run import session

ROOT = Path(__file__).parents[1]
WORKERS = "mpsrun workers"
FIRST_STEP_REPEATS = 3
TUNING_REPEATS = 3
LATER_STEPS = 20


class Small(nn.Module):
    """Branches of almost nothing that add up: what remains is the cost of crossing."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(branches))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


CROSSING = Case("small", 16, Network(lambda: Small(4), (Input((64,)),), (16,)))


def crossing(repeats: int) -> dict[str, Any]:
    """CPU time of the lead for one region with workers, against plain autograd on the same four branches."""
    model, workers = CROSSING.of.make(), f"{config.current().worker_count()} workers"
    sides = {
        "plain": Stepper(CROSSING, model, "eager"),
        workers: Stepper(CROSSING, model, WORKERS),
    }
    for stepper in sides.values():
        stepper.warm_up()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, stepper in sides.items():
            times[name].append(lead_us(stepper, 200))
    row: dict[str, Any] = {"part": "lead CPU of a step with one region, us"}
    row |= {name: spread(values, 1) for name, values in times.items()}
    row["beyond plain autograd"] = round(row[workers][0] - row["plain"][0], 1)
    return row


def _answer(handle: ChunkHandle, rounds: int, ready: Any) -> None:
    other = open_device("cuda", 0)
    other.bind_counters(other.open_chunk(handle))
    ready.set()
    for i in range(1, rounds + 1):
        other.wait([0], [i], 60.0)
        other.signal([1], [i])
    other.synchronize()


def hand_off(rounds: int = 300) -> dict[str, Any]:
    """One way from a process's stream to another's, by stream memory operations: half a round trip."""
    here = open_device("cuda", 0)
    chunk = here.new_chunk(4096)
    here.bind_counters(chunk)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_answer, args=(chunk.handle, rounds, ready))
    process.start()
    if not ready.wait(60):
        raise TimeoutError("expected the other process to start within 60 s")
    time.sleep(1.0)  # its waits are queued by then
    torch.cuda._sleep(400_000_000)  # and so are ours before the first is answered
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(1, rounds + 1):
        here.signal([0], [i])
        here.wait([1], [i], 60.0)
    end.record()
    here.synchronize()
    process.join(30)
    return {
        "part": "GPU-side hand-off, one way, us",
        "mean": round(begin.elapsed_time(end) * 1e3 / rounds / 2, 2),
    }


def print_steps(name: str, steps: int) -> None:
    """Train plainly and print when each step was done: the script that `first_step` runs."""
    (case,) = chosen([name])
    model = case.of.make().to(device())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        case.of.loss(model(*(given.to(device()) for given in case.make_inputs()))).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        print(f"step {time.time():.3f}", flush=True)


def first_step(name: str) -> dict[str, Any]:
    """Seconds from the start of the process to the plain script's first step, and to mpsrun's first on lanes."""
    script = [str(ROOT / "scripts" / "bench"), "--print-steps", name]
    plain = [sys.executable, *script]
    fast = [sys.executable, "-m", "mpsrun", "--lanes", "workers", *script]
    _times(plain)  # not measured: it finds the caches of the disk cold
    plains, fasts = [], []
    for _ in range(FIRST_STEP_REPEATS):
        plains.append(_times(plain)[0])
        # The first step runs plain, in the second the network is compiled and looked at; the third is on lanes.
        fasts.append(_times(fast)[2])
    row = {"part": f"{name}: first step, s", "plain": spread(plains, 2), "mpsrun, first on lanes": spread(fasts, 2)}
    return row | {"later": round(statistics.median(fasts) - statistics.median(plains), 2)}


def _times(command: list[str]) -> list[float]:
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, check=True)
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    return [round(float(word) - start, 2) for _, word in words]


def tuning(case: Case) -> dict[str, Any]:
    """Seconds of the first steps beyond later ones: with all plans to be tried, and with the plan from a cache.

    Both compile and record the network; what they differ by is profiling and trying plans.
    """
    model = matrix.make(case)
    cold, warm = [], []
    with matrix.dynamo():
        _first_steps_s(case, model)  # not measured: libraries are loaded, and kernels chosen
        for _ in range(TUNING_REPEATS):
            with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
                cold.append(_first_steps_s(case, model))
                warm.append(_first_steps_s(case, model))
    return {
        "part": f"{case.name}: first steps under auto beyond later ones, s",
        "plans to be tried": spread(cold, 2),
        "plan from the cache": spread(warm, 2),
        "profiling and trying": round(statistics.median(cold) - statistics.median(warm), 2),
    }


def _first_steps_s(case: Case, model: nn.Module) -> float:
    stepper = Stepper(case, model, AUTO)
    seconds = stepper.warm_up()
    later_s = stepper.time_steps(LATER_STEPS) / 1e3
    matrix.forget()
    return seconds - stepper.warm_up_steps * later_s


def soak(steps: int) -> dict[str, Any]:
    """Memory of lead and workers after a tenth of the steps and after all of them, MiB."""
    stepper = Stepper(CROSSING, CROSSING.of.make(), WORKERS)
    stepper.warm_up()
    row: dict[str, Any] = {"part": f"memory over {steps} steps, MiB: after a tenth, after all, growth"}
    stepper.time_steps(steps // 10)
    before = _memory_mib()
    stepper.time_steps(steps - steps // 10)
    after = _memory_mib()
    growth = {name: f"{(after[name] / before[name] - 1) * 100:+.2f} %" for name in before}
    return row | {name: [before[name], after[name], growth[name]] for name in before}


def _memory_mib() -> dict[str, float]:
    owner = session.current()
    found = {"lead RSS": _rss_mib(None)}
    for link in owner.links if owner is not None else []:
        if link.pid is not None:
            found[f"worker {link.index} RSS"] = _rss_mib(link.pid)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["GPU, all processes"] = round((total - free) / 2**20, 1)
    return found


def _rss_mib(pid: int | None) -> float:
    return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
