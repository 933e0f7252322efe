"""Convolutions tuned beside their siblings: who runs in which thread beside whom. cuDNN itself is for tests/gpu."""

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from captures import noted, on_captured
from networks import SMALL
from torch import fx
from transparency import assert_same, moved, trained

from mpsrun.config import Config
from mpsrun.device import CpuDevice
from mpsrun.graph.regions import Branch, Region
from mpsrun.plan.lanes import WHOLE
from mpsrun.run import cotuning, report, special
from mpsrun.run.cotuning import Laned, Thread, TunedRecorder, difference, tuned
from mpsrun.run.recorder import Repeater
from mpsrun.run.worker import Worker
from mpsrun.wire import messages as m

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BUSY = "mpsrun-siblings"


class Steps:
    """Branches whose steps note their threads, and whether cuDNN may choose meanwhile."""

    def __init__(self) -> None:
        self.runs: dict[str, list[str]] = {}
        self.beside: dict[str, set[str]] = {}  # by branch, the siblings that ran while it did
        self.chooses: set[bool] = set()

    def branch(self, name: str, group: int = 0, has_convolutions: bool = True) -> Laned:
        return Laned(group, -1, (0, WHOLE), lambda: self._step(name), 100, has_convolutions)

    def _step(self, name: str) -> None:
        thread = threading.current_thread().name
        self.runs.setdefault(name, []).append(thread)
        self.chooses.add(torch.backends.cudnn.benchmark)
        if thread == BUSY:
            return
        beside = {other: runs.count(BUSY) for other, runs in self.runs.items()}
        if any(other.name == BUSY for other in threading.enumerate()):
            deadline_s = time.monotonic() + 20
            while not any(runs.count(BUSY) > beside.get(other, 0) for other, runs in self.runs.items()):
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
            self.beside[name] = {other for other, runs in self.runs.items() if runs.count(BUSY) > beside.get(other, 0)}


def nothing() -> None:
    """A graph without a rest."""


def test_each_branch_is_tuned_beside_its_siblings() -> None:
    steps, rest = Steps(), []
    branches = [
        steps.branch("a"),
        steps.branch("b"),
        steps.branch("plain", has_convolutions=False),
        steps.branch("other", group=1),
        steps.branch("another", group=1),
        steps.branch("no convolution", group=2, has_convolutions=False),
    ]
    made = tuned(Repeater(), CPU, branches, lambda: rest.append(threading.current_thread().name), 0)
    assert isinstance(made, TunedRecorder)
    assert steps.chooses == {True}
    assert not torch.backends.cudnn.benchmark
    ours = {threads[-1] for name, threads in tuned_runs(steps).items()}
    assert ours == {*rest}  # one thread, and another one than that of the choices alone
    assert steps.beside["a"] <= {"b", "plain"}
    assert steps.beside["b"] <= {"a", "plain"}
    assert steps.beside["other"] == {"another"}
    assert "plain" not in tuned_runs(steps)
    assert "no convolution" not in steps.runs
    assert made.record(lambda: threading.current_thread().name).replay() != rest[0]  # a CPU computes when it replays


def tuned_runs(steps: Steps) -> dict[str, list[str]]:
    """By branch, the threads of the runs after the one that is alone."""
    own = {name: [thread for thread in threads if thread != BUSY] for name, threads in steps.runs.items()}
    return {name: threads[1:] for name, threads in own.items() if threads[1:]}


def test_a_branch_without_siblings_is_tuned_too() -> None:
    steps = Steps()
    tuned(Repeater(), CPU, [steps.branch("a")], nothing, 0)
    assert [len(threads) for threads in steps.runs.values()] == [2]


def test_what_takes_too_long_is_tuned_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cotuning, "LIMIT_S", 0.0)
    steps, rest = Steps(), []
    assert isinstance(tuned(Repeater(), CPU, [steps.branch("a")], lambda: rest.append("it all"), 0), TunedRecorder)
    assert (steps.runs, rest) == ({}, ["it all"])


def test_what_fails_leaves_the_recorder(capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise torch.OutOfMemoryError("no memory for a sibling")

    recorder = Repeater()
    found = tuned(recorder, CPU, [replace(Steps().branch("a"), step=broken)], nothing, 0)
    assert found is recorder
    assert not torch.backends.cudnn.benchmark
    assert "fastest alone (OutOfMemoryError: no memory" in capfd.readouterr().err


def test_a_thread_takes_over_modes_and_errors() -> None:
    thread, x = Thread("cpu"), torch.ones(3, requires_grad=True)
    seen: list[str] = []

    def step() -> torch.dtype:
        y = x.unsqueeze(0) @ x.unsqueeze(1)
        y.register_hook(lambda _: seen.append(threading.current_thread().name))
        torch.autograd.grad(y.sum(), x)
        return y.dtype

    with torch.autocast("cpu", torch.bfloat16):
        assert thread.run(step) == torch.bfloat16
    assert thread.run(step) == torch.float32
    assert seen == [thread.run(lambda: threading.current_thread().name)] * 2
    with torch.no_grad():
        assert not thread.run(torch.is_grad_enabled)
    with torch.inference_mode():
        assert thread.run(torch.is_inference_mode_enabled)
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)


def test_one_line_tells_what_was_chosen() -> None:
    alone = Counter({"wgrad_256": 2, "sgemm": 3})
    assert difference(alone, alone) == "convolutions beside their siblings: the same kernels as alone"
    assert difference(alone, Counter({"wgrad_64": 2, "sgemm": 3})) == (
        "convolutions beside their siblings: 2 of 5 kernels are others than alone: "
        "2 x wgrad_64 instead of 2 x wgrad_256"
    )


@pytest.mark.parametrize("name", ["googlenet", "inception", "channels last"])
def test_networks_compute_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Forward, backward and buffers: tuning leaves no trace, and recordings come from its thread."""
    torch._dynamo.reset()
    report.graphs.clear()
    made, tunings = noted(monkeypatch), []
    forced = special.forced_captured
    monkeypatch.setattr(special, "forced_captured", lambda *args: with_tuning(forced(*args)))
    tune = cotuning.tuned
    monkeypatch.setattr(cotuning, "tuned", lambda *args: (tunings.append(args), tune(*args))[1])
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().double())
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    for step in range(4):
        given = tuple(moved(x, "cpu", torch.float64) for x in case.inputs())
        assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    ((_, _, branches, _, _),) = tunings
    assert sum(branch.has_convolutions for branch in branches) >= 2
    assert [graph.replays for graph in made] == [2]
    assert isinstance(made[0]._recorder, TunedRecorder)


def with_tuning(candidate: special.Candidate) -> special.Candidate:
    return replace(candidate, plan=replace(candidate.plan, tuned=True))


def test_who_may_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless asked for, and where a script wants the same bits each time, it gets the algorithms of plain PyTorch."""
    node = fx.Graph().call_function(torch.conv2d)
    planner = object.__new__(special.Planner)
    planner._kind, planner._regions = "cuda", [Region(0, (Branch((node,)), Branch(())), None)]
    assert not planner.tunes
    monkeypatch.setattr(special.config, "current", lambda: Config(tune_convolutions=True))
    assert planner.tunes
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert not planner.tunes
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    planner._regions = [Region(0, (Branch(()), Branch(())), None)]
    assert not planner.tunes


@pytest.mark.parametrize("set_by_script", [False, True])
def test_settings_of_the_script_stay_while_algorithms_are_chosen(
    set_by_script: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another thread has recorded was made for them."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", set_by_script)
    before = cotuning.modes.flags()
    with cotuning.modes.choosing(by_time=not set_by_script):
        with cotuning.modes.choosing(by_time=True):  # as two threads do
            assert torch.backends.cudnn.benchmark
            assert cotuning.modes.flags() == before
        assert cotuning.modes.flags() == before
    assert torch.backends.cudnn.benchmark is set_by_script
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not set_by_script)
    assert cotuning.modes.flags() != before


@pytest.mark.parametrize("benchmark", [False, True])
def test_workers_prepare_under_the_settings_of_the_script(benchmark: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuDNN chose at the first run is kept; afterwards a worker's own settings are as they were."""
    seen: list[bool] = []
    worker = Worker(1, Silent())  # type: ignore[arg-type]
    worker._device, worker._executor = CpuDevice(), Executing(lambda: seen.append(torch.backends.cudnn.benchmark))  # type: ignore[assignment]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    flags = cotuning.modes.flags()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    state = cotuning.modes.ambient("cpu")
    worker._handle(m.Prepare(1, 0, 1, False, state, [], {}, [], [], [], [], flags=flags))
    assert seen == [benchmark]
    assert torch.backends.cudnn.benchmark is not benchmark


class Silent:
    def send(self, message: object) -> None:
        """Nobody listens."""


class Executing:
    """An executor that only warms up."""

    def __init__(self, warm_up: Callable[[], None]) -> None:
        self.layouts: dict[int, m.Prepare] = {}
        self.jobs = {1: type("job", (), {"unbound": None})}
        self.warm_up = lambda _layout: warm_up()
