"""Which plan a graph runs under: forced, pinned, kept from an earlier run, or tuned on the script's own steps."""

import copy
import dataclasses
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pool
import pytest
import torch
from networks import SMALL, Three, why_not_here
from torch import Tensor, nn
from transparency import TOLERANCE, Trained, assert_same, assert_transparent, trained
from tuned import Timed, auto_lanes, compiled

from mpsrun import config
from mpsrun.plan import tuner
from mpsrun.plan.planfile import PlanFile
from mpsrun.run import explain, lower, plans, report, special, tuning
from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.link import Link
from mpsrun.run.recorder import Repeater
from mpsrun.wire.messages import Prepare

MOST_STEPS = 900  # until the workers are ready, which takes as long as it takes, a script runs plainly


@pytest.fixture
def tuned(workers: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Coordinator]:
    with auto_lanes(workers, monkeypatch, tmp_path):
        yield workers


def train(sides: tuple[Trained, Trained], steps: int) -> None:
    """Train plainly and tuned; nothing may differ, whatever is tried."""
    for step in range(steps):
        x = torch.randn(5, 6, dtype=torch.float64)
        wanted, found = (side.step((x,), step) for side in sides)
        assert_same(found, wanted, f"step {step}", TOLERANCE)


def both(workers: int = 2) -> tuple[Trained, Trained]:
    plain = Three().double()
    return trained(plain), trained(compiled(copy.deepcopy(plain), lanes="auto", workers=workers))


def until_decided(sides: tuple[Trained, Trained]) -> tuple[str, str]:
    """Train until there is a decision; the plan that was kept, and what is said about it."""
    for _ in range(MOST_STEPS):
        train(sides, 1)
        if plans._saved.graphs:
            (kept,) = plans._saved.graphs.values()
            return str(kept.plan), kept.description
        pool.settle(pool.current())  # type: ignore[arg-type]
    raise AssertionError(f"no decision within {MOST_STEPS} steps")


def test_the_fastest_is_kept(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides = both()
    plan, description = until_decided(sides)
    assert "worker 1" in plan
    assert "worker 2" in plan
    assert description == "training of 5x6"
    assert len(clock.names) <= tuner.MAX_STEPS
    before = report.graphs[0].calls
    train(sides, 4)
    assert report.graphs[0].calls == before + 4


def test_two_calls_before_a_backward_are_one_step(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call by itself would be timed once without a backward and once with that of both."""
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    sides, steps = both(), 0
    models = [side.model for side in sides]
    for _ in range(MOST_STEPS):
        if plans._saved.graphs:
            break
        first, second = torch.randn(2, 5, 6, dtype=torch.float64)
        for model in models:
            model.zero_grad()
            (model(first) * model(second)).sum().backward()
        found, wanted = ([p.grad for p in model.parameters()] for model in models)
        torch.testing.assert_close(found, wanted)
        steps += bool(clock.names)
        pool.settle(pool.current())  # type: ignore[arg-type]
    assert len(clock.names) <= steps <= tuner.MAX_STEPS
    (kept,) = plans._saved.graphs.values()
    assert "worker 1" in str(kept.plan)


def test_what_can_be_captured_needs_no_workers(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special.Planner, "_may_capture", True)
    monkeypatch.setattr(Coordinator, "begin", lambda _coordinator: pytest.fail("workers were told to start"))
    clock = Timed(monkeypatch, {"serial": 1000.0, "captured": 500.0})
    plan, _ = until_decided(both())
    assert plan.startswith("captured")
    assert {*clock.names} == {"serial", "captured"}


def test_workers_are_tried_where_it_cannot_be_captured(
    tuned: Coordinator, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing shows that before it is tried; the next run knows."""
    monkeypatch.setattr(special.Planner, "_may_capture", True)

    def refused(_recorder: Repeater, _function: object, _forward: object = None) -> object:
        raise RuntimeError("planted")

    monkeypatch.setattr(Repeater, "record", refused)
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    plan, _ = until_decided(both())
    assert "worker 1" in plan
    assert {"serial", "workers, 3 lanes"} <= {*clock.names}
    assert capfd.readouterr().err.count("cannot be captured, it runs uncaptured (RuntimeError: planted)") == 1
    monkeypatch.setattr(plans, "_saved", PlanFile())
    torch._dynamo.reset()
    clock.names.clear()
    sides = both()
    train(sides, 4)
    (kept,) = plans._saved.graphs.values()
    assert (str(kept.plan), clock.names) == (plan, [])
    assert "captured" not in capfd.readouterr().err


def test_one_recording_that_fails_leaves_the_others(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special.Planner, "_may_capture", True)
    monkeypatch.setattr(special.Planner, "has_streams", True)
    rooms: list[object] = []

    def full_once(recorder: Repeater) -> None:
        rooms.append(recorder)
        if len(rooms) == 2:
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Repeater, "make_room", full_once)
    Timed(monkeypatch, {"serial": 1000.0, "captured": 400.0, "captured streams": 450.0, "workers, 3 lanes": 300.0})
    plan, _ = until_decided(both())
    assert plan.startswith("captured")
    assert len(rooms) >= 2


def test_a_lack_of_memory_is_not_for_other_runs(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned without what there was no room for once, and with it when there is."""
    monkeypatch.setattr(special.Planner, "_may_capture", True)
    Timed(monkeypatch, {"serial": 700.0, "captured": 500.0, "workers, 3 lanes": 600.0})

    def full(_recorder: Repeater) -> None:
        raise torch.OutOfMemoryError("planted")

    found = []
    for is_full in (True, False, True):
        monkeypatch.setattr(plans, "_saved", PlanFile())
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            if is_full:
                patch.setattr(Repeater, "make_room", full)
            found.append(until_decided(both())[0])
    assert "worker 1" in found[0]
    assert found[1].startswith("captured")
    assert found[2] == found[1], "it was decided on before, and runs on its streams"


def test_plans_that_failed_leave_nothing(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the garbage is collected: their recordings are gigabytes."""
    monkeypatch.setattr(special.Planner, "_may_capture", True)
    made: list[weakref.ref[Captured]] = []
    failures: list[Exception] = []
    make, give_up = Captured.__init__, Captured._give_up

    def noted(self: Captured, *args: Any) -> None:
        make(self, *args)
        made.append(weakref.ref(self))

    def gave_up(self: Captured, error: Exception) -> None:
        give_up(self, error)
        failures.append(error)

    def refused(_recorder: Repeater, _function: object, _forward: object = None) -> object:
        raise RuntimeError("planted")

    monkeypatch.setattr(Captured, "__init__", noted)
    monkeypatch.setattr(Captured, "_give_up", gave_up)
    monkeypatch.setattr(Repeater, "record", refused)
    Timed(monkeypatch, {"serial": 1000.0})
    sides = both()
    gc.collect()
    gc.disable()
    try:
        while not failures:
            train(sides, 1)
            assert not plans._saved.graphs, "it cannot be captured"
        train(sides, 2)
        assert made
        assert [ref() for ref in made] == [None] * len(made)
    finally:
        gc.enable()


def test_what_other_candidates_needed_is_given_back(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when it is known which plan is kept: to ask the GPU for memory again costs time."""
    seen: list[int] = []
    trim = Coordinator.trim

    def noted(self: Coordinator) -> None:
        seen.append(len(plans._saved.graphs))
        trim(self)

    monkeypatch.setattr(Coordinator, "trim", noted)
    Timed(monkeypatch, {"serial": 500.0})
    sides = both()
    until_decided(sides)
    train(sides, 4)
    assert seen == [1]


def test_a_network_that_is_dropped_leaves_nothing(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plans keep recordings, with the activations of a step each; no other network may ever be tuned."""
    Timed(monkeypatch, {"serial": 1000.0})
    sides = both()
    until_decided(sides)
    last = weakref.ref(tuning._tuning())  # type: ignore[arg-type, misc]
    assert last() is not None
    del sides
    torch._dynamo.reset()
    gc.collect()
    assert last() is None


def test_serial_where_nothing_pays(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, {"serial": 500.0})
    sides = both()
    plan, _ = until_decided(sides)
    assert "worker" not in plan
    before = report.graphs[0].calls
    train(sides, 4)
    assert report.graphs[0].calls == before
    assert report.graphs[0].plain


def test_the_next_run_knows(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    plan, _ = until_decided(both())
    monkeypatch.setattr(plans, "_saved", PlanFile())
    torch._dynamo.reset()
    clock.names.clear()
    sides = both()
    train(sides, 1)
    (kept,) = plans._saved.graphs.values()
    assert (str(kept.plan), clock.names) == (plan, [])


def test_a_tuned_plan_is_explained(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(config.current(), explain="text")
    monkeypatch.setattr(config, "current", lambda: settings)
    Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    for source in ("tuned", "cached"):
        monkeypatch.setattr(explain, "_watched", [])
        monkeypatch.setattr(plans, "_saved", PlanFile())
        until_decided(both())
        (plan,) = explain.of_script().plan
        assert (plan.name, plan.source) == ("workers, 3 lanes", source)
        assert plan.measured_step_us == pytest.approx(500.0, abs=10)
        by_name = {candidate.name: candidate for candidate in plan.candidates}
        assert by_name["serial"].predicted_step_us == by_name["serial"].measured_step_us
        assert f"* {plan.name}" in str(explain.of_script())
        torch._dynamo.reset()


def test_branches_are_timed_alone_once(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where candidates are tuned; the next run takes the times from the cache, and so finds the same candidates."""
    times = {0: (7000.0, 2000.0, 1000.0)}
    runs = []
    monkeypatch.setattr(special, "MEASURED", {"cpu"})
    monkeypatch.setattr(special.Profiler, "times", lambda *_: runs.append("measured") or times)
    monkeypatch.setattr(special, "measured_us", lambda found: found)
    Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    until_decided(both())
    (path,) = config.current().plan_cache_dir.glob("*.json")
    assert json.loads(path.read_text())["entry"]["branch_us"] == {"0": [7000.0, 2000.0, 1000.0]}
    torch._dynamo.reset()
    train(both(), 1)
    assert runs == ["measured"]


def test_a_pinned_plan_is_followed(tuned: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    until_decided(both())
    path = tmp_path / "pinned.txt"
    path.write_text(str(plans._saved).replace("worker 1", "worker 3"))
    settings = dataclasses.replace(config.current(), plan=path)
    monkeypatch.setattr(config, "current", lambda: settings)
    plans.pins.cache_clear()
    torch._dynamo.reset()
    report.graphs.clear()
    train(both(3), 4)
    assert [region.calls for region in report.graphs[0].regions] == [3]
    assert {lane for region in report.graphs[0].regions for lane in region.lanes} == {0, 2, 3}


def test_a_plan_for_another_network(
    tuned: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.txt"
    path.write_text("# mpsrun plan 1\n\ngraph 0123456789abcdef  another\nregion 0: lead | worker 1\n")
    settings = dataclasses.replace(config.current(), plan=path)
    monkeypatch.setattr(config, "current", lambda: settings)
    plans.pins.cache_clear()
    train(both(), 3)
    assert "expected a plan for graph" in capfd.readouterr().err


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_side_streams(workers: Coordinator, name: str) -> None:
    """On a CPU they are all one; what is left is the way to them and back."""
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().double())
    fast = trained(compiled(copy.deepcopy(plain.model), lanes="streams"))
    report.graphs.clear()
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(3):
            inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs())
            assert_same(fast.step(inputs, step), plain.step(inputs, step), f"step {step}", TOLERANCE)
    (graph,) = report.graphs
    assert graph.calls == 2
    assert any(lane < 0 for region in graph.regions for lane in region.lanes)


class Siamese(nn.Module):
    """One encoder for two inputs, or two."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.right = self.left if shares else copy.deepcopy(self.left)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(y)], 1)


@pytest.mark.parametrize("shares", [True, False])
def test_streams_that_share_parameters_are_told_so(monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """Each of them makes casts of its own under autocast: none waits for those of another one."""
    torch._dynamo.reset()
    told: list[bool] = []
    opened = lower.open_sides

    def noted(*args: Any) -> Any:
        told.append(args[3])
        return opened(*args)

    monkeypatch.setattr(lower, "open_sides", noted)
    model = compiled(Siamese(shares), lanes="streams")
    for _ in range(3):
        model(torch.randn(5, 6), torch.randn(5, 6)).sum().backward()
    assert told
    assert set(told) == {shares}


def test_streams_and_workers_in_one_region(workers: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsrun.plan import candidates

    def mixed(_planner: object, region: Any, _busy: object) -> Any:
        lanes = [(0, 1, -1, 2, -2)[i % 5] for i in range(len(region.branches))]
        free = [0 if branch.pinned else lane for branch, lane in zip(region.branches, lanes, strict=True)]
        return candidates.Assignment(tuple(free))

    monkeypatch.setattr(candidates._Planner, "forced", mixed)
    for name in ("pathnet", "googlenet"):
        case = SMALL[name]
        assert_transparent(case.model, case.inputs, 4, case.regions)
        torch._dynamo.reset()


def test_what_cannot_be_planned_for_still_trains(
    tuned: Coordinator, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a fault of mpsrun's own")

    monkeypatch.setattr(plans, "key_of", broken)
    train(both(), 3)
    assert "could not be planned for" in capfd.readouterr().err


def test_shares_are_told_to_the_workers(
    tuned: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A CPU has none to give out, and says so; if it had, the workers would be told theirs, and the table would too."""
    Timed(monkeypatch, {"serial": 1000.0, "workers, 3 lanes": 500.0})
    until_decided(both())
    path = tmp_path / "pinned.txt"
    path.write_text(str(plans._saved).replace("worker 1", "worker 1 at 40%").replace("worker 2", "worker 2 at 30%"))
    settings = dataclasses.replace(config.current(), plan=path)
    monkeypatch.setattr(config, "current", lambda: settings)
    plans.pins.cache_clear()
    torch._dynamo.reset()
    train(both(), 1)
    assert "a share of the multiprocessors, which this device" in capfd.readouterr().err

    monkeypatch.setattr(special.Planner, "has_shares", True)
    prepared = []
    send = Link.send
    monkeypatch.setattr(Link, "send", lambda link, message: (prepared.append(message), send(link, message))[1])
    torch._dynamo.reset()
    report.graphs.clear()
    train(both(), 4)
    shares = sorted(message.share for message in prepared if isinstance(message, Prepare))
    assert shares in ([(0, 30), (30, 40)], [(0, 40), (40, 30)])
    (region,) = report.graphs[0].regions
    assert region.calls == 3
    assert {"worker 1 at 40%", "worker 2 at 30%"} < {*region.shown}
