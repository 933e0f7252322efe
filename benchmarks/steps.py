"""Training steps of one network under one engine; the timed loop is the same for all engines."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.engines import ENGINES, MOST_WARM_UP_STEPS, RECORDED, STEPS_UNTIL_THRIFT, WARM_UP_STEPS
from mpsrun.run import report

FEW_STEPS = 3  # that are not timed: after them the allocator has what it needs


def device() -> str:
    """Where everything is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stepper:
    """A copy of a network under one engine; `step` is one training step without the optimizer."""

    def __init__(self, case: Case, model: nn.Module, engine: str) -> None:
        self.model = copy.deepcopy(model).to(device())
        self._of = case.of
        self._batch = case.make_inputs()
        if device() == "cuda":
            self._batch = [given.pin_memory() for given in self._batch]
        on_device = [given.to(device()) for given in self._batch]
        self._known = len(report.graphs)
        self._call = ENGINES[engine](self.model, on_device, case.of.bf16)
        self.warm_up_steps = WARM_UP_STEPS
        self._is_recorded = engine in RECORDED and device() == "cuda"

    @property
    def graphs(self) -> list[report.Graph]:
        """What mpsrun has made of the network, as long as no other one is set up."""
        return report.graphs[self._known :]

    def step(self) -> Tensor:
        """Copy the batch, forward, loss, backward; returns the loss, which nobody has waited for."""
        torch.autograd.set_multithreading_enabled(True)  # as PyTorch has it; mpsrun's calls change it
        inputs = [given.to(device(), non_blocking=True) for given in self._batch]
        with torch.autocast(device(), torch.bfloat16, enabled=self._of.bf16):
            loss = self._of.loss(self._call(*inputs))
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Forget the gradients, as an optimizer does."""
        self.model.zero_grad(set_to_none=True)

    def warm_up(self) -> float:
        """The first steps, with everything that is compiled, started and tuned in them; returns seconds."""
        seconds = self.time_steps(self.warm_up_steps) * self.warm_up_steps / 1e3
        while self.warm_up_steps < MOST_WARM_UP_STEPS and any(graph.undecided for graph in self.graphs):
            seconds += self.time_steps(WARM_UP_STEPS) * WARM_UP_STEPS / 1e3
            self.warm_up_steps += WARM_UP_STEPS
        if self._is_recorded:
            seconds += self.time_steps(STEPS_UNTIL_THRIFT) * STEPS_UNTIL_THRIFT / 1e3
            self.warm_up_steps += STEPS_UNTIL_THRIFT
        return seconds

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
