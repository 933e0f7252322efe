"""A worker without memory for a region: the region moves to the lead, and the worker goes on with everything else."""

import copy
import dataclasses
from typing import Any

import pool
import pytest
import torch
from networks import Three
from torch import nn
from transparency import TOLERANCE

import mpsrun
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.shortage import lacks_memory
from tests.faults.workers.conftest import SPARE_S, Orders, Training, batch

SAID = "runs in the lead from now on: no memory in worker 1: planted: no memory"


@pytest.fixture(autouse=True)
def _nobody_is_lost(lively: Coordinator) -> Any:
    before = [link.pid for link in lively.links]
    yield
    pool.settle(lively)
    assert [link.pid for link in lively.links] == before
    assert pool.lost(lively) == {}


def test_strict(lively: Coordinator, orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lively._watcher, "_settings", dataclasses.replace(lively.settings, strict=True))
    training = Training(lively)
    for _ in range(3):
        training.step()
    orders.give(1, "forward", "OOM")
    with pytest.raises(torch.OutOfMemoryError, match="in worker 1: planted"):
        training.steps_until(lambda: False, SPARE_S)


@pytest.mark.parametrize("phase", ["prepare", "forward", "backward"])
def test_the_region_moves_to_the_lead(lively: Coordinator, orders: Orders, phase: str, capfd: Any) -> None:
    if phase == "prepare":
        orders.give(1, phase, "OOM")
    training = Training(lively)
    for _ in range(3):
        training.step()
    if phase != "prepare":
        orders.give(1, phase, "OOM")
    training.steps_until(orders.are_followed, SPARE_S)
    training.step()  # the first one that finds the region closed
    before = executed(lively)
    for _ in range(5):
        training.step()
    assert executed(lively) == before, "neither worker is asked any more"
    training.assert_undisturbed()
    assert training.longest_s < SPARE_S
    assert capfd.readouterr().err.count(SAID) == 1
    other = Training(lively)
    for _ in range(4):
        other.step()
    other.assert_undisturbed()
    assert executed(lively)[0] > before[0], "another network still uses the worker"
    assert [counts.kept for counts in lively.counts().values()] == [0, 0], "nothing waits for a backward"


def test_with_several_forwards_under_way(lively: Coordinator, orders: Orders) -> None:
    """One of them is the lead's, and so is its backward; the order of the others' work is kept."""
    training = Training(lively)
    for _ in range(3):
        training.step()
    plain = Three().double()
    plain.load_state_dict(training.model.state_dict())
    for model in (plain, training.model):
        outputs = []
        for i in range(4):
            if i == 2 and model is training.model:
                orders.give(1, "forward", "OOM")
            outputs.append(model(batch(i)))
        model.zero_grad()
        total = torch.stack(outputs).square().sum()
        total.backward(retain_graph=True)
        total.backward()
    for (name, p), q in zip(training.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **TOLERANCE, msg=name)
    assert orders.are_followed()


def test_with_more_work_in_its_ring(lively: Coordinator, orders: Orders) -> None:
    """Branches are sent one by one, and waited for at the end: what comes after the refused one is done after it."""
    torch.manual_seed(0)
    fast = mpsrun.Branches([nn.Linear(6, 6) for _ in range(7)], join="cat").double()
    plain = copy.deepcopy(fast)
    for step in range(8):
        if step in (3, 5):
            orders.give(1, "forward" if step == 3 else "backward", "OOM")
        for model in (fast, plain):
            model.zero_grad()
        found = fast(batch(step), active=range(7))
        wanted = torch.cat([branch(batch(step)) for branch in plain], 1)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        for outputs in (found, wanted):
            outputs.square().sum().backward()
        for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **TOLERANCE)
    assert orders.are_followed()


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_are_meant(error: RuntimeError, wanted: bool) -> None:
    assert lacks_memory(error) == wanted


def test_the_allocator_of_a_cpu() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert lacks_memory(found.value)


def executed(coordinator: Coordinator) -> list[int]:
    counts = coordinator.counts()
    return [sum(counts[i].forwards.values()) + sum(counts[i].backwards.values()) for i in (1, 2)]
