"""Whole runs of a script under the launcher, with a pinned plan: the same losses, whatever becomes of a worker."""

import json
import time
from pathlib import Path

import pytest

from tests.faults.workers.conftest import BACK_S, Orders
from tests.launch.conftest import Runner, runner  # noqa: F401

SCRIPT = """
import json, sys, time
import torch
from torch import nn
from mpsrun.run import session

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.cat([path(x) for path in self.paths], 1))

torch.set_num_threads(1)
torch.manual_seed(0)
model = Net().double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
losses = []
pace_s = 0.1 if sys.argv[1] == "until-back" else 0.01  # it never makes more steps than the other

def step():
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(len(losses)))
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    time.sleep(pace_s)

def is_back():
    links = session.current().links
    return links[0].generation and links[0].lost is None and links[0].prepared

deadline = time.monotonic() + 30
for _ in range(10):
    step()
while sys.argv[1] == "until-back" and not is_back() and time.monotonic() < deadline:
    step()
while sys.argv[1] == "300" and len(losses) < 300:
    step()
for _ in range(5):
    step()
print(json.dumps([losses, session.current().counts()[1].generation]))
"""


def trained(made: Runner, *args: str) -> tuple[list[float], int, str]:
    """The losses, which process did the work of worker 1 in the end, and what was said."""
    made.script(SCRIPT)
    start = time.monotonic()
    done = made.mpsrun("--workers", "2", *args)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 2 * BACK_S
    losses, generation = json.loads(done.stdout)
    return losses, generation, done.stderr.decode()


@pytest.fixture
def planted(runner: Runner, orders: Orders) -> Runner:  # noqa: F811
    runner.env |= orders.environment()
    return runner


@pytest.mark.parametrize(
    ("fault", "phase", "cause", "by_launcher"),
    [
        ("SIGKILL", "forward", "process", "was killed by SIGKILL"),
        pytest.param("exit", "backward", "process", "ended with status 3", marks=pytest.mark.slow),
        pytest.param("SIGSEGV", "backward", "process", "was killed by SIGSEGV", marks=pytest.mark.slow),
        pytest.param("exception", "forward", "RuntimeError: planted", "", marks=pytest.mark.slow),
        pytest.param("SIGKILL", "startup", "", "was killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_the_same(
    planted: Runner, orders: Orders, tmp_path: Path, fault: str, phase: str, cause: str, by_launcher: str
) -> None:
    plan = str(tmp_path / "plan.txt")
    undisturbed, generation, told = trained(planted, "--lanes", "workers", "--save-plan", plan, "train.py", "300")
    assert (generation, "is out" in told) == (0, False)
    orders.give(1, phase, fault)
    losses, generation, told = trained(planted, "--plan", plan, "train.py", "until-back")
    assert losses == pytest.approx(undisturbed[: len(losses)], rel=1e-9)
    assert generation == 1
    assert not cause or f"worker 1 is out: {cause}" in told
    assert f"worker 1 (pid " not in told if not by_launcher else by_launcher in told  # noqa: F541
    assert "worker 1 is back" in told


@pytest.mark.slow
def test_at_the_end(planted: Runner, orders: Orders) -> None:
    """A worker that is killed when it is told to end changes nothing."""
    orders.give(1, "shutdown", "SIGKILL")
    losses, generation, told = trained(planted, "--lanes", "workers", "train.py", "at once")
    assert (len(losses), generation) == (15, 0)
    assert "is out" not in told
