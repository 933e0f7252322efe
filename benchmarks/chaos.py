"""Random faults on a training, and what became of it: the engine of `scripts/chaos`.

One round is one training under `mpsrun --max-restarts`. Faults come from outside, by a signal to a process of the run,
or are asked of the script. A killed launcher is started again, as a batch system would. At the end the journal must
have the losses of an undisturbed run, and nothing of the run may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TRAINING = Path(__file__).with_name("chaos_training.py")
STEPS = 100
STEPS_ON_GPU = 400  # which takes them faster
MARK = "MPSRUN_CHAOS"  # in the environment of everything that a round starts
LEFT_S = 5.0  # after which nothing may be left
ROUND_S = 600.0
SAME = 1e-6  # relative deviation of a loss up to which it is the undisturbed one

# role of the process, and the signal that it gets; "script": what the script is asked to do
Fault = tuple[str, str]
ANYWHERE: tuple[Fault, ...] = (
    ("worker", "SIGKILL"), ("worker", "SIGSEGV"), ("worker", "SIGSTOP"),
    ("lead", "SIGKILL"), ("lead", "SIGSEGV"), ("lead", "SIGABRT"), ("script", "raise"), ("script", "exit"),
    ("launcher", "SIGKILL"), ("keeper", "SIGKILL"), ("socket", "removed"), ("checkpoint", "torn"),
)  # fmt: skip
ON_GPU: tuple[Fault, ...] = (
    ("script", "illegal access"),
    ("CUDA MPS server", "SIGKILL"), ("CUDA MPS daemon", "SIGKILL"), ("CUDA MPS guard", "SIGKILL"),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How a run goes: for so many minutes, or until each of `faults` was injected.

    within_s: seconds in which a training has to be back.
    """

    minutes: float
    faults: tuple[Fault, ...]
    seed: int
    workers: int
    within_s: float
    on_gpu: bool

    @property
    def steps(self) -> int:
        """Of one training."""
        return STEPS_ON_GPU if self.on_gpu else STEPS


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Read `worker SIGKILL: 20, script illegal access: 5`. Raises `argparse.ArgumentTypeError` for what is no fault."""
    found: list[Fault] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = item.partition(":")
        known = {f"{role} {how}": (role, how) for role, how in ANYWHERE + ON_GPU}
        if name.strip() not in known or not count.strip().isdigit():
            raise argparse.ArgumentTypeError(f"expected 'FAULT: COUNT' with a fault of {sorted(known)}, found {item!r}")
        found += [known[name.strip()]] * int(count)
    return tuple(found)


class Bag:
    """Where faults come from: any of them for so many seconds, or each exactly as often as asked for."""

    def __init__(self, generator: random.Random, faults: Sequence[Fault], until_s: float = float("inf")) -> None:
        self._generator, self._faults, self._until_s = generator, [*faults], until_s
        self._endless = until_s < float("inf")

    def __bool__(self) -> bool:
        return bool(self._faults) and time.monotonic() < self._until_s

    def draw(self) -> Fault:
        """The next one."""
        return self._generator.choice(self._faults)

    def injected(self, fault: Fault) -> None:
        """It was done; one that could not be done is drawn again."""
        if not self._endless:
            self._faults.remove(fault)


@dataclass
class Figures:
    """What a run of chaos has seen; times in seconds."""

    rounds: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    launches: int = 0
    steps: int = 0
    repeated: int = 0
    lost: int = 0
    leftovers: list[str] = field(default_factory=list)
    deviation: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything came back, and nothing was lost or left."""
        is_whole = not self.lost and not self.leftovers and not self.wrong and self.deviation <= SAME
        return is_whole and self.injected == self.recovered

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        totals = {"injected_total": self.injected.total(), "recovered_total": self.recovered.total()}
        return vars(self) | {"injected": dict(self.injected), "recovered": dict(self.recovered)} | totals


@dataclass
class Journal:
    """What the training has written so far."""

    losses: dict[int, float] = field(default_factory=dict)
    lives: int = 0
    repeated: int = 0
    lost: int = 0
    differs: float = 0.0
    ended: bool = False

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read the journal; a last line that is cut short is left out."""
        found = cls()
        text = path.read_text() if path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():
            found._take(line.split())
        return found

    def _take(self, words: list[str]) -> None:
        match words:
            case ["start", step]:
                self.lives += 1
                # The last step is written down before its checkpoint, so that it may be done a second time.
                self.lost += max(0, max(self.losses, default=0) - int(step))
            case ["end"]:
                self.ended = True
            case [step, loss]:
                if int(step) in self.losses:
                    self.repeated += 1
                    self.differs = max(self.differs, apart(self.losses[int(step)], float(loss)))
                self.losses[int(step)] = float(loss)


def apart(found: float, wanted: float) -> float:
    """Return how far two numbers are apart, relative to the second."""
    return abs(found - wanted) / max(abs(wanted), 1e-12)


class Round:
    """One training, disturbed a few times."""

    def __init__(self, figures: Figures, generator: random.Random, faults: Bag, options: Options) -> None:
        self.figures = figures
        self.generator = generator
        self.faults = faults
        self.options = options
        self.place = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.runtime = Path(tempfile.mkdtemp(prefix="r-"))
        self.log = self.place / "stderr"
        self.launcher: subprocess.Popen[bytes] | None = None

    @property
    def journal(self) -> Journal:
        return Journal.read(self.place / "journal")

    def clear(self) -> None:
        """Remove the round's directories."""
        for directory in (self.place, self.runtime):
            shutil.rmtree(directory, ignore_errors=True)

    def start(self) -> None:
        """Start the launcher, or start it again."""
        paths = os.pathsep.join(filter(None, [str(TRAINING.parents[1]), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, MARK: self.place.name, "XDG_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": paths}
        words = ["--lanes", "workers", "--workers", str(self.options.workers), "--timeout", "5", "--max-restarts", "99"]
        command = [sys.executable, "-m", "mpsrun", *words, str(TRAINING), str(self.place), str(self.options.steps)]
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.figures.launches += 1

    def run(self) -> Journal:
        """Run the training to its end, disturbed while there are faults; returns its journal."""
        deadline = time.monotonic() + ROUND_S
        self.start()
        while not self.journal.ended and time.monotonic() < deadline:
            self._go_on_for(self.generator.uniform(0.3, 4.0))
            if self.faults and not self.journal.ended:
                self._disturb(self.faults.draw())
        self._finish()
        return self.journal

    def _go_on_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.journal.ended:
            self._start_again_where_gone()
            time.sleep(0.05)

    def _start_again_where_gone(self) -> None:
        assert self.launcher is not None
        status = self.launcher.poll()
        if status is not None and not self.journal.ended:
            if status != -signal.SIGKILL:
                self.figures.wrong.append(f"{self.place.name}: the launcher ended with {status}")
            self._check_leftovers()
            self.start()

    def _disturb(self, fault: Fault) -> None:
        role, how = fault
        name = f"{role} {how}"
        before = self.journal
        if not self._inject(role, how):
            return
        self.faults.injected(fault)
        self.figures.injected[name] += 1
        start = time.monotonic()
        reached = max(before.losses, default=-1)
        while time.monotonic() - start < self.options.within_s:
            self._start_again_where_gone()
            now = self.journal
            if now.ended or max(now.losses, default=-1) > reached + 1:
                took_s = time.monotonic() - start
                self.figures.recovered[name] += 1
                self.figures.longest_s[name] = round(max(self.figures.longest_s.get(name, 0.0), took_s), 1)
                return
            time.sleep(0.02)
        self.figures.wrong.append(f"{self.place.name}: no step within {self.options.within_s:g} s of {name}")

    def _inject(self, role: str, how: str) -> bool:
        """Do it; False where there is nothing to do it to, as before the first step."""
        assert self.launcher is not None
        if role == "script":
            (self.place / "wanted").write_text(how)
            return True
        if role == "socket":
            sockets = sorted(self.runtime.glob("mpsrun/*/report"))
            for path in sockets:
                path.unlink(missing_ok=True)
            return bool(sockets)
        if role == "checkpoint":
            return self._tear()
        found = [self.launcher.pid] if role == "launcher" else self._pids(role)
        if not found or self.launcher.poll() is not None:
            return False
        os.kill(self.generator.choice(found), signal.Signals[how])
        return True

    def _tear(self) -> bool:
        """Put half a checkpoint of the next step there, and have the script end: it must not be believed."""
        found = sorted((self.place / "checkpoints").glob("step-*.pt"))
        if not found:
            return False
        try:
            data = found[-1].read_bytes()
        except FileNotFoundError:  # pruned meanwhile
            return False
        step = int(found[-1].name.split("-")[1]) + 1
        found[-1].with_name(f"step-{step:010}-{'0' * 16}.pt").write_bytes(data[: len(data) // 2])
        (self.place / "wanted").write_text("exit")
        return True

    def _pids(self, role: str) -> list[int]:
        """The processes of this round in a role."""
        word = {"CUDA MPS server": "nvidia-cuda-mps-server", "CUDA MPS daemon": "nvidia-cuda-mps-control",
                "CUDA MPS guard": "mps-daemon"}.get(role, role)  # fmt: skip
        found = []
        for process in self._processes():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            is_role = any(Path(part).name.strip() == word for part in words[:6])
            if is_role and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                found.append(process.pid)
        return found

    def _processes(self) -> list[psutil.Process]:
        """Everything that carries this round's mark."""
        wanted = f"{MARK}={self.place.name}".encode()
        found = []
        for process in psutil.process_iter():
            try:
                if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def _finish(self) -> None:
        assert self.launcher is not None
        try:
            status = self.launcher.wait(30)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            status = self.launcher.wait()
        if status != 0:
            self.figures.wrong.append(f"{self.place.name}: the last launcher ended with {status}, see {self.log}")
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        deadline = time.monotonic() + LEFT_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.figures.leftovers += left

    def _left(self) -> list[str]:
        processes = [f"process {p.pid}" for p in self._processes() if p.status() != psutil.STATUS_ZOMBIE]
        base = self.runtime / "mpsrun"
        directories = [f"directory {entry}" for entry in base.iterdir() if entry.is_dir()] if base.exists() else []
        return processes + directories


def chaos(options: Options) -> Figures:
    """Disturb trainings as long as there are faults; what is under way then is finished undisturbed."""
    figures, generator = Figures(), random.Random(options.seed)
    undisturbed = Round(Figures(), generator, Bag(generator, ()), options)
    wanted = undisturbed.run()
    undisturbed.clear()
    if not wanted.ended:
        raise RuntimeError("expected the undisturbed training to end, found that it does not")
    if options.faults:
        bag = Bag(generator, options.faults)
    else:
        faults = ANYWHERE + ON_GPU if options.on_gpu else ANYWHERE
        bag = Bag(generator, faults, time.monotonic() + 60 * options.minutes)
    while bag:
        trial = Round(figures, generator, bag, options)
        wrong_before = len(figures.wrong) + len(figures.leftovers)
        found = trial.run()
        figures.rounds += 1
        figures.restarts += max(0, found.lives - 1)
        figures.steps += len(found.losses)
        figures.repeated += found.repeated
        figures.lost += found.lost
        if found.losses.keys() != wanted.losses.keys():
            figures.wrong.append(f"{trial.place.name}: steps {sorted(wanted.losses.keys() ^ found.losses.keys())}")
        pairs = [(found.losses[step], wanted.losses[step]) for step in found.losses.keys() & wanted.losses.keys()]
        figures.deviation = max(figures.deviation, found.differs, *(apart(*pair) for pair in pairs))
        if len(figures.wrong) + len(figures.leftovers) == wrong_before:  # else they tell what went wrong
            trial.clear()
    return figures
