"""Networks on captured lanes, and the recordings behind them."""

import pytest
from torch import nn

from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import Captured


def noted(patch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs that are made from now on."""
    found: list[Captured] = []
    make = Captured.__init__

    def note(self: Captured, *args: object) -> None:
        make(self, *args)
        found.append(self)

    patch.setattr(Captured, "__init__", note)
    return found


def on_captured(model: nn.Module) -> nn.Module:
    """Compile a module in place, captured lanes forced."""
    model.compile(backend=mpsrun, options={"lanes": "captured"})
    return model


def on_captured_workers(model: nn.Module, workers: int) -> nn.Module:
    """Compile a module in place, every legal region forced into workers, and captured there and in the lead."""
    model.compile(backend=mpsrun, options={"lanes": "captured-workers", "workers": workers})
    return model
