"""Each example runs under plain python and under mpsrun, unchanged, with the same losses."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN_S = 240
LANES = ("-m", "mpsrun", "--lanes", "workers", "--workers", "2", "--verbose")
LOSS = re.compile(r"loss(?:es)?:((?: \d+\.\d+)+)$", re.MULTILINE)
IN_WORKER = re.compile(r"worker \d+ +│ (?P<forward>[^│]+)│ (?P<backward>[^│]+)│")


@dataclass(frozen=True)
class Example:
    """packages: what it needs beside torch. executions: what workers run at least, forward and backward."""

    name: str
    args: tuple[str, ...]
    packages: tuple[str, ...]
    executions: int


CASES = [
    Example("digits.py", ("--steps", "6", "--losses", "/dev/stdout"), ("sklearn", "rich"), 100),
    Example("lightning_digits.py", ("--epochs", "1"), ("sklearn", "lightning"), 40),
    Example("accelerate_digits.py", ("--epochs", "1"), ("sklearn", "accelerate"), 80),
    Example("pathnet.py", ("--rounds", "5"), ("sklearn",), 80),
]


def marked(case: Example) -> Any:
    """All but the first are slow."""
    return pytest.param(case, id=case.name, marks=() if case is CASES[0] else pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
@pytest.mark.timeout(2 * RUN_S + 60)
def test_same_losses_under_mpsrun(case: Example) -> None:
    for package in case.packages:
        pytest.importorskip(package)
    plain, fast = run(case), run(case, *LANES)
    assert losses(plain.stdout)
    assert losses(fast.stdout) == pytest.approx(losses(plain.stdout), rel=1e-4)
    for column in ("forward", "backward"):
        times = sum(times_of(row[column]) for row in IN_WORKER.finditer(fast.stderr))
        assert times >= case.executions, fast.stderr


def run(case: Example, *launcher: str) -> subprocess.CompletedProcess[str]:
    """The example's run, which ended well. One thread: the same kernels run in workers as in the script."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, *launcher, str(EXAMPLES / case.name), *case.args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    return done


def losses(text: str) -> list[float]:
    """The losses that an example printed, in order."""
    lines = [number for found in LOSS.findall(text) for number in found.split()]
    return [float(number) for number in lines or re.findall(r"^\d+\.\d+$", text, re.MULTILINE)]


def times_of(cell: str) -> int:
    """The executions in a cell of the table: "12", "3 x 4" or "12 in all"."""
    return math.prod(int(number) for number in re.findall(r"\d+", cell))


@pytest.mark.slow
def test_an_example_that_is_started_again(tmp_path: Path) -> None:
    """Ended in the middle of a step, plain or on lanes, it prints what it prints undisturbed."""
    pytest.importorskip("sklearn")
    outputs = []
    for lanes, more in (("serial", ()), ("serial", ("--fail-at", "30")), ("workers", ("--fail-at", "30"))):
        folder = tmp_path / str(len(outputs))
        case = Example("resume.py", ("--checkpoints", str(folder), *more), ("sklearn",), 0)
        outputs.append(run(case, "-m", "mpsrun", "--lanes", lanes, "--max-restarts", "1").stdout)
    assert outputs[0].count("epoch") == 2
    assert outputs == [outputs[0]] * 3
