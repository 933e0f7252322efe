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
