"""What happens to workers while others are lost, while one is started again, and while work is under way."""

import copy
import os
import signal
import time
from typing import Any

import pool
import pytest
import torch
from networks import Three
from torch import nn
from transparency import TOLERANCE

import mpsrun
from mpsrun.config import Config
from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import BACK_S, SPARE_S, WATCHDOG_S, Orders, Training, batch


def kill(coordinator: Coordinator, *workers: int) -> None:
    for worker in workers:
        pid = coordinator.links[worker - 1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


def trained(coordinator: Coordinator, steps: int = 3) -> Training:
    training = Training(coordinator)
    for _ in range(steps):
        training.step()
    return training


@pytest.mark.parametrize(
    "phase", [pytest.param("startup", marks=pytest.mark.slow), "start", pytest.param("prepare", marks=pytest.mark.slow)]
)
def test_lost_while_it_is_started_again(lively: Coordinator, orders: Orders, phase: str, capfd: Any) -> None:
    """The second process is lost as well, and the third one works."""
    training, generation = trained(lively), lively.links[0].generation
    orders.give(1, phase, "SIGKILL")
    kill(lively, 1)
    training.steps_until(lambda: training.works_in(1, generation + 2), 2 * BACK_S)
    training.assert_undisturbed()
    told = capfd.readouterr().err
    assert told.count("worker 1 is out") == (1 if phase == "startup" else 2)
    assert "stays out" not in told


@pytest.mark.slow
def test_lost_before_it_is_taken_in(lively: Coordinator) -> None:
    """The script does something else meanwhile: the second process is there, and gone again, before its next step."""
    training, generation = trained(lively), lively.links[0].generation
    kill(lively, 1)
    pool.wait_until(lambda: 1 in lively._watcher.heirs, BACK_S)
    heir = lively._watcher.heirs[1]
    assert heir.pid is not None
    os.kill(heir.pid, signal.SIGKILL)
    pool.wait_until(lambda: lively._watcher.heirs.get(1, heir) is not heir, BACK_S)
    assert lively.links[0].generation == generation
    training.steps_until(lambda: training.works_in(1, generation + 2), BACK_S)
    training.assert_undisturbed()


@pytest.mark.slow
def test_both_at_once(lively: Coordinator) -> None:
    training, generations = trained(lively), [link.generation for link in lively.links]
    kill(lively, 1, 2)
    for worker in (1, 2):
        training.steps_until(lambda w=worker: training.works_in(w, generations[w - 1] + 1), BACK_S)
    training.assert_undisturbed()


def test_both_within_one_step(lively: Coordinator, orders: Orders) -> None:
    """One in forward, one in backward of the same step."""
    training, generations = trained(lively), [link.generation for link in lively.links]
    orders.give(1, "forward", "SIGKILL")
    orders.give(2, "backward", "exception")
    training.step()
    for worker in (1, 2):
        training.steps_until(lambda w=worker: training.works_in(w, generations[w - 1] + 1), BACK_S)
    training.assert_undisturbed()


def test_backward_of_a_process_that_was_replaced(lively: Coordinator) -> None:
    """The forwards under way belong to the process that is gone, although its successor is at work already."""
    training, generation = trained(lively), lively.links[0].generation
    plain = Three().double()
    plain.load_state_dict(training.model.state_dict())
    models = (plain, training.model)
    outputs = [[model(batch(i)) for i in range(3)] for model in models]
    kill(lively, 1)
    bystander = Training(lively)
    bystander.steps_until(lambda: bystander.works_in(1, generation + 1), BACK_S)
    bystander.step()
    for model, found in zip(models, outputs, strict=True):
        model.zero_grad()
        torch.stack(found).square().sum().backward()
    for (name, p), q in zip(training.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **TOLERANCE, msg=name)
    pool.settle(lively)


@pytest.mark.slow
def test_lost_while_a_network_is_compiled(lively: Coordinator) -> None:
    """It is planned with the worker, which takes its part once it is back."""
    generation = lively.links[0].generation
    training = Training(lively)
    kill(lively, 1)
    training.steps_until(lambda: training.works_in(1, generation + 1), BACK_S)
    training.assert_undisturbed()


@pytest.mark.slow
def test_branches_that_are_chosen(lively: Coordinator) -> None:
    """Sets of branches go to the workers that are there, and to all of them in the end."""
    torch.manual_seed(0)
    fast = mpsrun.Branches([nn.Linear(6, 6) for _ in range(4)], join="cat").double()
    plain, generation, step = copy.deepcopy(fast), lively.links[0].generation, 0
    sets = [(0, 1, 2, 3), (3, 1, 0), (2, 3, 1), (0, 3), (1, 0, 2), (2, 1), (3, 0, 1)]
    deadline = time.monotonic() + BACK_S
    while step < 10 or not works_again(lively, generation + 1):
        assert time.monotonic() < deadline
        active = sets[step % len(sets)]
        x = batch(step)
        if step == 9:
            kill(lively, 1)
        fast.zero_grad()
        plain.zero_grad()
        fast(x, active=active).square().sum().backward()
        torch.cat([plain[i](x) for i in active], 1).square().sum().backward()
        for found, wanted in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, **TOLERANCE)
        step += 1


def works_again(coordinator: Coordinator, generation: int) -> bool:
    link = coordinator.links[0]
    if link.generation < generation or not link.prepared:
        return False
    counts = coordinator.counts().get(1)
    return counts is not None and sum(counts.backwards.values()) > 0


@pytest.mark.slow
def test_numbers_beyond_half_of_what_a_counter_counts(lively: Coordinator) -> None:
    """A counter that starts at 0 would seem to be ahead of them."""
    training, generation = trained(lively), lively.links[0].generation
    for number in (0x60000000, 0xA0000000):
        pool.settle(lively)
        with lively.lock:
            lively.pool.sequence = number
            for link in lively.links:
                lively.device.signal((link.done,), (number,))
        training.step()
    kill(lively, 1)
    training.steps_until(lambda: training.works_in(1, generation + 1), BACK_S)
    training.assert_undisturbed()


def test_closed_while_a_worker_is_started_again(orders: Orders) -> None:
    """Nothing is left of it; `Footprint` looks after the module."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=WATCHDOG_S)) as coordinator:
        training = trained(coordinator)
        kill(coordinator, 1)
        pool.wait_until(lambda: pool.lost(coordinator) != {})
        training.step()
        start = time.monotonic()
    assert time.monotonic() - start < WATCHDOG_S + SPARE_S


def test_no_more_restarts(orders: Orders, capfd: Any) -> None:
    """It is said once that the worker stays out, and the others take over its branches."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=WATCHDOG_S, worker_restarts=1)) as coordinator:
        training = trained(coordinator)
        kill(coordinator, 1)
        training.steps_until(lambda: training.works_in(1, 1), BACK_S)
        kill(coordinator, 1)
        training.steps_until(lambda: coordinator.usable() == [2], SPARE_S)
        before = counted(coordinator, 2)
        for _ in range(5):
            training.step()
        assert counted(coordinator, 2) >= before + 2 * 3  # the first call of the new plan looks
        told = capfd.readouterr().err
        assert told.count("it is started again") == 1
        assert told.count("the run goes on without it") == 1
        time.sleep(0.5)
        assert coordinator.usable() == [2]


@pytest.mark.slow
def test_a_device_that_is_not_in_order(orders: Orders, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A fault of a worker may have poisoned the lead's own CUDA context: then nobody gets its place."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=WATCHDOG_S)) as coordinator:
        monkeypatch.setattr(coordinator.device, "is_sound", lambda _: False)
        training = trained(coordinator)
        kill(coordinator, 1)
        training.steps_until(lambda: coordinator.usable() == [2], BACK_S)
        training.step()
        assert capfd.readouterr().err.count("worker 1 stays out: the GPU is not in order") == 1


def counted(coordinator: Coordinator, worker: int) -> int:
    counts = coordinator.counts()[worker]
    return sum(counts.forwards.values()) + sum(counts.backwards.values())
