"""A worker that raises, dies or hangs: the numbers stay right and the run goes on without it, or --strict ends it."""

import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pool
import pytest
import torch
from networks import Three
from torch import Tensor, nn
from transparency import TOLERANCE, assert_same, on_lanes

import mpsrun
from mpsrun.config import Config
from mpsrun.errors import WorkerError
from mpsrun.run.coordinator import Coordinator
from mpsrun.wire import messages as m

WATCHDOG_S = 3.0
SPARE_S = 4.0  # what killing, computing again and this machine's other work may take on top
Fault = Callable[[Coordinator, int, pytest.MonkeyPatch], None]


def killed(coordinator: Coordinator, victim: int, _: pytest.MonkeyPatch) -> None:
    """Die in the middle of the next piece of work: stopped now, killed when the lead waits."""
    pid = pid_of(coordinator, victim)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()


def stuck(coordinator: Coordinator, victim: int, _: pytest.MonkeyPatch) -> None:
    """Do nothing from now on."""
    os.kill(pid_of(coordinator, victim), signal.SIGSTOP)


def raising(coordinator: Coordinator, victim: int, patch: pytest.MonkeyPatch) -> None:
    """Be told to do the next piece of work with a layout that does not exist."""
    send_step = coordinator._channel.send_step

    def send_wrong(worker: int, message: m.Forward | m.Backward) -> None:
        send_step(worker, msgspec.structs.replace(message, layout=10**9) if worker == victim else message)

    patch.setattr(coordinator._channel, "send_step", send_wrong)


def pid_of(coordinator: Coordinator, worker: int) -> int:
    pid = coordinator.links[worker - 1].pid
    assert pid is not None
    return pid


class Pair:
    """The same network twice: plain, and on lanes with one worker, the `victim`."""

    def __init__(self, coordinator: Coordinator) -> None:
        torch.manual_seed(0)
        self.device = coordinator.device.kind
        self.plain = Three().double().to(self.device)
        self.fast = on_lanes(copy.deepcopy(self.plain), 1)
        self.coordinator = coordinator
        self.victim = coordinator.usable()[0]
        for step in range(2):
            self.step(step)

    def step(self, seed: int, between: Callable[[], None] = lambda: None) -> None:
        """One training step of both; `between` runs before the backward of the one on lanes."""
        given = batch(seed).to(self.device)
        wanted = self._step(self.plain, given.clone().requires_grad_(), lambda: None)
        found = self._step(self.fast, given.clone().requires_grad_(), between)
        assert_same(found, wanted, f"step {seed}", TOLERANCE)

    def _step(self, model: nn.Module, given: Tensor, between: Callable[[], None]) -> dict[str, Any]:
        model.zero_grad()
        output = model(given)
        between()
        output.square().sum().backward()
        seen = {"output": output.detach(), "gradient of the input": given.grad}
        seen |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.02)  # type: ignore[arg-type]
        return seen | {n: value.clone() for n, value in model.state_dict().items()}

    def assert_goes_on(self) -> None:
        """The victim is out, its siblings do the work."""
        assert self.victim not in self.coordinator.usable()
        heirs = self.coordinator.usable()[:1]
        before = self.executed(heirs)
        for step in range(10, 13):
            self.step(step)
        assert self.executed(heirs) > before or not heirs

    def executed(self, workers: list[int]) -> int:
        counts = self.coordinator.counts()
        return sum(sum(counts[i].forwards.values()) + sum(counts[i].backwards.values()) for i in workers)


def batch(seed: int) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="class")
def expendable() -> Iterator[Coordinator]:
    """More workers than a test loses, under a short watchdog."""
    with pool.running(Config(workers=12, lanes="workers", timeout_s=WATCHDOG_S, worker_restarts=0)) as coordinator:
        yield coordinator


@pytest.fixture(scope="class")
def strict() -> Iterator[Coordinator]:
    with pool.running(
        Config(workers=4, lanes="workers", timeout_s=WATCHDOG_S, worker_restarts=0, strict=True)
    ) as coordinator:
        yield coordinator


class OutOfRange(nn.Module):
    """A branch that fails for some inputs, wherever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([table(x).tanh().sum(1) for table in self.tables]).prod(0)


class TestStrict:
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_raising(self, strict: Coordinator, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same type, with the worker's traceback."""
        pair = Pair(strict)
        with pytest.raises(KeyError) as found:
            self._fail(pair, where, raising, monkeypatch)
        assert "1000000000" in str(found.value)
        assert f"in worker {pair.victim}" in str(found.value)
        assert "executor.py" in str(found.value) or "worker.py" in str(found.value)

    @pytest.mark.parametrize(("where", "fault"), [("forward", killed), ("backward", stuck)])
    def test_lost(
        self,
        strict: Coordinator,
        where: str,
        fault: Fault,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        pair = Pair(strict)
        with pytest.raises(WorkerError, match=f"worker {pair.victim} is out"):
            self._fail(pair, where, fault, monkeypatch)
        assert "the script ends, as --strict asks" in capfd.readouterr().err

    def _fail(self, pair: Pair, where: str, fault: Fault, patch: pytest.MonkeyPatch) -> None:
        """The error comes at once, or at the latest with the next step, where the lead had gone on already."""
        start = time.monotonic()
        if where == "forward":
            fault(pair.coordinator, pair.victim, patch)
            pair.step(2)
        else:
            pair.step(2, between=lambda: fault(pair.coordinator, pair.victim, patch))
        patch.undo()
        pair.step(3)
        assert time.monotonic() - start < WATCHDOG_S + SPARE_S


class TestGoesOn:
    @pytest.mark.parametrize("fault", [killed, stuck, raising])
    def test_in_forward(
        self, expendable: Coordinator, fault: Fault, monkeypatch: pytest.MonkeyPatch, capfd: Any
    ) -> None:
        pair = Pair(expendable)
        fault(expendable, pair.victim, monkeypatch)
        start = time.monotonic()
        pair.step(2)
        assert time.monotonic() - start < WATCHDOG_S + SPARE_S
        monkeypatch.undo()
        pair.assert_goes_on()
        told = capfd.readouterr().err
        assert f"worker {pair.victim} is out" in told
        assert fault is not raising or "KeyError: 1000000000" in told

    @pytest.mark.parametrize("fault", [killed, stuck, raising])
    def test_in_backward(self, expendable: Coordinator, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        pair = Pair(expendable)
        start = time.monotonic()
        pair.step(2, between=lambda: fault(expendable, pair.victim, monkeypatch))
        assert time.monotonic() - start < WATCHDOG_S + SPARE_S
        monkeypatch.undo()
        pair.assert_goes_on()

    def test_between_steps(self, expendable: Coordinator) -> None:
        pair = Pair(expendable)
        os.kill(pid_of(expendable, pair.victim), signal.SIGKILL)
        pair.step(2)
        pair.assert_goes_on()

    def test_with_several_forwards_under_way(self, expendable: Coordinator) -> None:
        """The activations of all of them died: each forward is done again, with the buffers as they were."""
        pair = Pair(expendable)
        for model in (pair.plain, pair.fast):
            outputs = [model(batch(i)) for i in range(4)]
            if model is pair.fast:
                os.kill(pid_of(expendable, pair.victim), signal.SIGKILL)
            model.zero_grad()
            torch.stack(outputs).square().sum().backward()
        for (name, p), q in zip(pair.fast.named_parameters(), pair.plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **TOLERANCE, msg=name)
        pair.assert_goes_on()

    def test_with_networks_of_one_kind_under_way(self, expendable: Coordinator) -> None:
        """They share a graph and its jobs: what each of them is owed is computed with its own parameters."""
        pair = Pair(expendable)
        plain_other = Three().double().to(pair.device)
        fast_other = on_lanes(copy.deepcopy(plain_other), 1)
        calls = pair.executed([pair.victim])
        for models in ((pair.plain, plain_other), (pair.fast, fast_other)):
            outputs = [model(batch(i).requires_grad_()) for i, model in enumerate(models)]
            if models[0] is pair.fast:
                assert pair.executed([pair.victim]) == calls + 2
                os.kill(pid_of(expendable, pair.victim), signal.SIGKILL)
            for model in models:
                model.zero_grad()
            torch.stack(outputs).square().sum().backward()
        for fast, plain in ((pair.fast, pair.plain), (fast_other, plain_other)):
            for (name, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, **TOLERANCE, msg=name)
        pair.assert_goes_on()

    def test_error_of_the_script(self, expendable: Coordinator) -> None:
        """What plain PyTorch raises is raised, and training can go on."""
        torch.manual_seed(0)
        plain = OutOfRange()
        fast = on_lanes(copy.deepcopy(plain), 2)
        good, bad = torch.tensor([[0, 4]]), torch.tensor([[0, 5]])
        for _ in range(3):
            fast(good).sum().backward()
        for model in (plain, fast):
            with pytest.raises(IndexError):
                model(bad).sum().backward()
        for _ in range(3):
            torch.testing.assert_close(fast(good), plain(good))

    def test_all_of_them(self, expendable: Coordinator) -> None:
        pair = Pair(expendable)
        for worker in expendable.usable():
            os.kill(pid_of(expendable, worker), signal.SIGKILL)
        pair.step(2)
        pool.wait_until(lambda: not expendable.usable())
        pair.assert_goes_on()


def test_worker_lost_between_sets_of_branches() -> None:
    """Every branch is sent to the workers that are left, and what was under way is computed here."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=WATCHDOG_S, worker_restarts=0)) as coordinator:
        torch.manual_seed(0)
        fast = mpsrun.Branches([nn.Linear(6, 6) for _ in range(4)], join="cat").double()
        plain = copy.deepcopy(fast)
        for step, active in enumerate([(0, 1, 2, 3), (3, 1, 0), (2, 3, 1), (0, 3), (1, 0, 2), (2, 1), (3, 0, 1)]):
            x = torch.randn(5, 6, dtype=torch.float64)
            if step == 2:
                os.kill(pid_of(coordinator, 1), signal.SIGKILL)
            fast(x, active=active).square().sum().backward()
            torch.cat([plain[i](x) for i in active], 1).square().sum().backward()
            for found, wanted in zip(fast.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(found.grad, wanted.grad, **TOLERANCE)
        assert coordinator.usable() == [2]
        assert sum(coordinator.counts()[2].backwards.values()) >= 5
