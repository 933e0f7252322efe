"""Plans that are tuned on a CPU, with a clock of the test's own."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mpsrun import config
from mpsrun.plan import cost
from mpsrun.plan.planfile import PlanFile
from mpsrun.run import backend, plans, report
from mpsrun.run import tuning as tuning_module
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.stepclock import StepClock


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(backend=backend.mpsrun, options=options)
    return model


@contextlib.contextmanager
def auto_lanes(coordinator: Coordinator, patch: pytest.MonkeyPatch, directory: Path) -> Iterator[None]:
    """A CPU on which lanes may pay, a cache of the test's own, and lanes that are not forced."""
    machine = dataclasses.replace(cost.MACHINES["cpu"], cores_shared=False, crossing_us=1.0)
    patch.setitem(cost.MACHINES, "cpu", machine)
    patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    settings = dataclasses.replace(coordinator.settings, lanes="auto", save_plan=directory / "plan.txt")
    patch.setattr(config, "current", lambda: settings)
    patch.setattr(plans, "_saved", PlanFile())
    patch.setattr(tuning_module, "_tuning", None)
    report.graphs.clear()
    plans.pins.cache_clear()
    yield
    plans.pins.cache_clear()


class Timed:
    """A clock by which each candidate takes as long as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, us: dict[str, float]) -> None:
        self.names: list[str] = []
        self.us = us
        monkeypatch.setattr(StepClock, "periods", self._periods())

    def _periods(self) -> Any:
        timed, real = self, StepClock.periods

        def periods(clock: StepClock) -> list[tuple[int, float]]:
            found = real(clock)
            names = [candidate.name for candidate in tuning_module._tuning().candidates]  # type: ignore[misc, union-attr]
            timed.names += [names[index] for index, _ in found]
            return [(i, timed.us.get(names[i], 1000.0) + 0.1 * k) for k, (i, _) in enumerate(found)]

        return periods
