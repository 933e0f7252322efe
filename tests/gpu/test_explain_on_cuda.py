"""Branches timed alone on a GPU: generators stay where they were, and memory is measured."""

import pytest
import torch
from networks import SMALL

import mpsrun
from mpsrun.config import Config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["googlenet", "dropout", "batch norm", "towers"])
def test_times_and_memory_of_each_branch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpsrun.config, "current", lambda: Config(workers=3))
    case = SMALL[name]
    model = case.model().cuda()
    inputs = tuple(x.cuda() for x in case.inputs())
    before = torch.cuda.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    found = mpsrun.explain(model, inputs)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())
    assert [len(region.branches) for region in found.regions] == list(case.regions)
    for branch in (branch for region in found.regions for branch in region.branches):
        assert branch.not_measured is None
        assert branch.forward_us is not None
        assert branch.forward_us > 0
        assert branch.peak_bytes is not None
        assert branch.peak_bytes > 0
    assert "MiB of memory" in str(found)
