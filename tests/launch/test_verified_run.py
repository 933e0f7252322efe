"""`mpsrun --verify N` from outside: the lines it writes, and the exit status of a script whose lanes go wrong."""

import pytest

from tests.launch.conftest import Runner

TRAINING = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(sum(path(x) for path in self.paths))

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    {fault}
    optimizer.zero_grad()
    loss = model(torch.randn(5, 6)).square().mean()
    try:
        loss.backward()
    except Exception:
        print("caught")
    optimizer.step()
print("end")
"""

FAULT = """
    if step == 4:
        from mpsrun.run import forkjoin
        collect = forkjoin._collect
        forkjoin._collect = lambda *args: [g if g is None else 2 * g for g in collect(*args)]
"""


def test_a_right_run(runner: Runner) -> None:
    runner.script(TRAINING.format(fault="pass"))
    done = runner.mpsrun("--lanes", "workers", "--workers", "1", "--verify", "2", "train.py")
    assert (done.returncode, done.stdout) == (0, b"end\n")
    (line,) = [line for line in done.stderr.decode().splitlines() if "verified" in line]
    assert line.startswith("mpsrun: verified 2 steps of a network: ")


def test_a_fault_ends_the_script_with_status_4(runner: Runner) -> None:
    runner.script(TRAINING.format(fault=FAULT.strip()))
    done = runner.mpsrun("--lanes", "workers", "--workers", "1", "--verify", "9", "train.py")
    assert (done.returncode, done.stdout) == (4, b"")
    text = done.stderr.decode()
    assert "paths.2.0.weight" in text
    assert "found other gradients of step 3 of 9" in text
    assert "Traceback" not in text


NO_BRANCHES = "import torch\nnet = torch.nn.Linear(2, 2)\nnet(torch.ones(1, 2))"


@pytest.mark.parametrize("text", [NO_BRANCHES, pytest.param("import torch", marks=pytest.mark.slow)])
def test_nothing_to_verify_is_said(runner: Runner, text: str) -> None:
    runner.script(text)
    done = runner.mpsrun("--verify", "2", "train.py")
    assert done.returncode == 0
    assert b"ran on lanes, so nothing was verified; --lanes workers forces" in done.stderr


def test_no_plan_to_save_is_said(runner: Runner) -> None:
    runner.script(NO_BRANCHES)
    done = runner.mpsrun("--save-plan", "plan.txt", "train.py")
    assert done.returncode == 0
    assert b"no plan was written to" in done.stderr
    assert not (runner.cwd / "plan.txt").exists()
