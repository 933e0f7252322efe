"""Whole training steps of networks under several engines."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import GoogLeNet, PathNet, Towers
from torch import nn

from mpsrun.run.backend import mpsrun

WARM_UP_STEPS = 6
WORKERS = "mpsrun workers"
ENGINES = ("eager", "reduce-overhead", WORKERS)


@dataclass(frozen=True)
class Case:
    """A network and a batch."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bf16: bool = False


CASES = {
    "towers-4": Case(Towers, (4, 128, 64)),
    "towers-32-bf16": Case(Towers, (32, 128, 64), bf16=True),
    "googlenet-8": Case(lambda: GoogLeNet(1000), (8, 3, 224, 224)),
    "googlenet-64": Case(lambda: GoogLeNet(1000), (64, 3, 224, 224)),
    "pathnet-32": Case(PathNet, (32, 3, 32, 32)),
}


def device() -> str:
    """Where everything is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stepper:
    """One network under one engine; `step` is one training step without the optimizer."""

    def __init__(self, case: Case, model: nn.Module, engine: str) -> None:
        self.model = copy.deepcopy(model).to(device())
        self._call: Callable[..., Any] = self.model
        if engine == WORKERS:
            self._call = torch.compile(self.model, backend=mpsrun, options={"lanes": "workers"})
        elif engine != "eager":
            self._call = torch.compile(self.model, mode=engine)
        self._case = case
        self._batch = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
        if device() == "cuda":
            self._batch = self._batch.pin_memory()

    def step(self) -> torch.Tensor:
        """Copy the batch, forward, loss, backward; returns the loss, which nobody has waited for."""
        batch = self._batch.to(device(), non_blocking=True)
        with torch.autocast(device(), torch.bfloat16, enabled=self._case.bf16):
            loss = self._call(batch).float().square().mean()
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Forget the gradients, as an optimizer does."""
        self.model.zero_grad(set_to_none=True)

    def warm_up(self) -> float:
        """The first steps, with everything that is compiled and started in them; returns seconds."""
        start = time.perf_counter()
        for _ in range(WARM_UP_STEPS):
            self.step()
            self.clear()
        synchronize()
        return time.perf_counter() - start

    def time_steps(self, steps: int) -> float:
        """Milliseconds a step."""
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
            self.clear()
        synchronize()
        return (time.perf_counter() - start) / steps * 1e3


def spread(values: Sequence[float], digits: int = 3) -> list[float]:
    """Median, minimum and maximum."""
    return [round(x, digits) for x in (statistics.median(values), min(values), max(values))]


def bench(name: str, engines: Sequence[str], repeats: int, steps: int) -> dict[str, Any]:
    """One row: every engine in turn, repeated; and whether losses and gradients agree with eager's."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    row: dict[str, Any] = {
        "network": name,
        "batch": list(case.shape),
        "dtype": "bf16" if case.bf16 else "tf32",
    }
    steppers = {engine: Stepper(case, model, engine) for engine in engines}
    row["set-up s"] = {engine: round(stepper.warm_up(), 2) for engine, stepper in steppers.items()}
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(repeats):
        for engine in engines:
            times[engine].append(steppers[engine].time_steps(steps))
    row["ms a step"] = {engine: spread(times[engine]) for engine in engines}
    if "eager" in engines and WORKERS in engines:
        row["speed-up"] = round(row["ms a step"]["eager"][0] / row["ms a step"][WORKERS][0], 2)
        row["deviation"] = deviation(case, model)
    return row


def deviation(case: Case, model: nn.Module) -> dict[str, float]:
    """Relative differences of the loss and of all gradients (in the norm) between eager and workers, TF32 off."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    plain, fast = Stepper(case, model, "eager"), Stepper(case, model, WORKERS)
    fast.warm_up()
    fast.model.load_state_dict(plain.model.state_dict())
    losses = [stepper.step().item() for stepper in (plain, fast)]
    both = zip(plain.model.parameters(), fast.model.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if a.grad is not None and b.grad is not None]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    total = torch.stack([a.norm() for a, _ in pairs]).norm()
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[0]), "gradients": (difference / total).item()}
