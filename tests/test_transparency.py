"""A network on lanes does what the plain network does: outputs, gradients, parameters, buffers, random numbers."""

import pytest
import torch
from networks import SMALL, why_not_here
from transparency import assert_transparent

from mpsrun.run.coordinator import Coordinator


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(workers: Coordinator, name: str, count: int) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    with torch._dynamo.config.patch(allow_rnn=True):
        options = {"used": case.used, "forward_only": case.forward_only}
        assert_transparent(case.model, case.inputs, count, case.regions, **options)  # type: ignore[arg-type]
