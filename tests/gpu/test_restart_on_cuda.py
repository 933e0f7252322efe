"""Workers on the GPU that are started again, or have no memory: the numbers of plain PyTorch, and nobody lost."""

import copy
import time
from collections.abc import Iterator

import pool
import pytest
import torch
from networks import Three
from torch import nn
from transparency import assert_same, on_lanes

from mpsrun.config import Config
from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import Orders, ordering

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def orders() -> Iterator[Orders]:
    with ordering() as made:
        yield made


@pytest.fixture(scope="module")
def lively(daemon: None, orders: Orders) -> Iterator[Coordinator]:
    """Two workers that are started again, and follow orders."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=4.0, worker_restarts=20), "cuda") as coordinator:
        yield coordinator


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("exception", "forward"),
        ("exception", "backward"),
        ("exception", "between"),
        ("exit", "between"),
        ("SIGKILL", "between"),
    ],
)
def test_the_worker_comes_back(lively: Coordinator, orders: Orders, fault: str, phase: str) -> None:
    """One that ends by itself does so between steps: with kernels under way it may take the lead's context along."""
    generation = lively.links[0].generation
    plain, fast = pair()
    for step in range(3):
        same_step(plain, fast, step)
    torch.cuda.synchronize()
    orders.give(1, phase, fault)
    if phase == "between":
        lively.counts(timeout_s=0.5)
    deadline, step = time.monotonic() + 60, 3
    while not works(lively, generation + 1):
        assert time.monotonic() < deadline
        same_step(plain, fast, step)
        step += 1
    for more in range(3):
        same_step(plain, fast, step + more)
    assert orders.are_followed()


@pytest.mark.parametrize("phase", ["prepare", "forward", "backward"])
def test_no_memory(lively: Coordinator, orders: Orders, phase: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The region moves to the lead, and no process is lost."""
    before = [link.pid for link in lively.links]
    if phase == "prepare":
        orders.give(1, phase, "OOM")
    plain, fast = pair()
    for step in range(8):
        if step == 3 and phase != "prepare":
            orders.give(1, phase, "OOM")
        same_step(plain, fast, step)
        torch.cuda.synchronize()
        pool.settle(lively)
    assert orders.are_followed()
    assert capfd.readouterr().err.count("no memory in worker 1: planted") == 1
    assert [link.pid for link in lively.links] == before
    assert pool.lost(lively) == {}


def pair() -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Three().to("cuda", torch.float64)
    return plain, on_lanes(copy.deepcopy(plain), 2)


def same_step(plain: nn.Module, fast: nn.Module, step: int) -> None:
    x = torch.randn(5, 6, device="cuda", dtype=torch.float64, generator=torch.Generator("cuda").manual_seed(step))
    seen = []
    for model in (plain, fast):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen.append({"output": output.detach(), **gradients})
    assert_same(seen[1], seen[0], f"step {step}", EXACT)


def works(coordinator: Coordinator, generation: int) -> bool:
    link = coordinator.links[0]
    if link.generation < generation or not link.prepared:
        return False
    counts = coordinator.counts().get(1)
    return counts is not None and sum(counts.backwards.values()) > 0
