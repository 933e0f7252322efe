"""Workers in which faults can be planted, and a training whose curve is known."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pool
import pytest
import torch
from networks import Three
from torch import Tensor
from tuned import compiled

from mpsrun.config import Config
from mpsrun.launch import workers as launched
from mpsrun.run.coordinator import Coordinator

HOOK = Path(__file__).parent / "hook"
WATCHDOG_S = 2.0
SPARE_S = 4.0  # what a report, computing again and this machine's other work may take on top
BACK_S = 20.0  # until a worker that was lost works again, on a machine with other work
PACE_S = 0.01


class Orders:
    """Has workers do what `hook/sitecustomize.py` can do to them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
        return {"MPSRUN_TEST_FAULTS": str(self.directory), "PYTHONPATH": paths}

    def give(self, worker: int, phase: str, fault: str) -> None:
        made = self.directory / f".{worker}-{phase}"
        made.write_text(fault)
        made.rename(self.directory / f"{worker}-{phase}")

    def are_followed(self) -> bool:
        return not list(self.directory.iterdir())


@contextlib.contextmanager
def ordering() -> Iterator[Orders]:
    """Every process that is started meanwhile looks for orders."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        made = Orders(Path(directory))
        for name, value in made.environment().items():
            patch.setenv(name, value)
        patch.setattr(launched, "BACK_OFF_S", (0.0,))
        yield made


@pytest.fixture(scope="module")
def orders() -> Iterator[Orders]:
    with ordering() as made:
        yield made


@pytest.fixture(scope="module")
def lively(orders: Orders) -> Iterator[Coordinator]:
    """Two workers that are started again however often they end, under a short watchdog."""
    with pool.running(Config(workers=2, lanes="workers", timeout_s=WATCHDOG_S, worker_restarts=100)) as coordinator:
        yield coordinator


class Training:
    """The same steps each time: a network on lanes forced into two workers, whose losses are kept."""

    def __init__(self, coordinator: Coordinator, lanes: str = "workers") -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.coordinator = coordinator
        self.model = compiled(Three().double(), lanes=lanes, workers=2)
        self.losses: list[float] = []
        self.longest_s = 0.0

    def step(self) -> float:
        start = time.monotonic()
        self.model.zero_grad()
        loss: Tensor = self.model(batch(len(self.losses))).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p.sub_(p.grad, alpha=0.02)  # type: ignore[arg-type]
        self.losses.append(loss.item())
        self.longest_s = max(self.longest_s, time.monotonic() - start)
        return self.losses[-1]

    def assert_undisturbed(self) -> None:
        """The losses are those of plain PyTorch, but for the order in which gradients of branches are added."""
        torch.manual_seed(0)
        plain = Training.__new__(Training)
        plain.model, plain.losses, plain.longest_s = Three().double(), [], 0.0
        assert self.losses == pytest.approx([plain.step() for _ in self.losses], rel=1e-9)

    def steps_until(self, done: Callable[[], bool], deadline_s: float) -> float:
        """Train until `done()`; returns how many seconds that took."""
        start = time.monotonic()
        while not done():
            assert time.monotonic() < start + deadline_s, f"not within {deadline_s} s"
            self.step()
            time.sleep(PACE_S)
        return time.monotonic() - start

    def works_in(self, worker: int, generation: int) -> bool:
        """Whether a worker's process of this generation or a later one has done work, asked of itself."""
        link = self.coordinator.links[worker - 1]
        if link.generation < generation or not link.started or link.lost is not None or not link.prepared:
            return False
        counts = self.coordinator.counts().get(worker)
        return counts is not None and sum(counts.backwards.values()) > 0


def batch(step: int) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
