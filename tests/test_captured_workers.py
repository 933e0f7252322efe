"""Captured worker lanes: all that lead and workers do for a replay. On a CPU it computes anew, in each of them."""

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captures import (
    Heads,
    Pair,
    assert_settings_are_followed,
    assert_transparent,
    evaluation,
    gradient_penalty,
    inputs,
    kept_graph,
    kept_results,
    noted,
    on_captured_workers,
    saved_plan,
    step,
    three,
    train_pinned,
    two_forwards,
)
from networks import SMALL, GoogLeNet, Three, images
from torch import Tensor, nn
from transparency import assert_executed, moved, trained

from mpsrun.errors import NotNow, NotShippable
from mpsrun.run import captured, report
from mpsrun.run import link as link_module
from mpsrun.run import state as modes
from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing
from mpsrun.run.link import STEP, SUBMITTED, Link, Replayed
from mpsrun.run.relay import Relay
from mpsrun.run.special import Planner


@pytest.fixture
def made(workers: Coordinator, nothing_kept: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Captured]]:
    """All captured graphs of a test."""
    found = noted(monkeypatch)
    yield found
    found.clear()


def on_two(model: nn.Module) -> nn.Module:
    return on_captured_workers(model, 2)


def pair_of(make: Callable[[], nn.Module] = three) -> Pair:
    return Pair(on_two, make, calls=4)


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks(made: list[Captured], name: str) -> None:
    assert_transparent(name, lambda model: on_captured_workers(model, 3), made)
    (graph,) = report.graphs
    if not SMALL[name].forward_only:  # of regions that are cut in another way
        assert_executed(graph, 4, 4)


def test_one_message_for_all_regions(made: list[Captured], workers: Coordinator) -> None:
    """A worker has one sequence number for a forward through nine regions, and one for the backward."""
    fast = trained(on_captured_workers(GoogLeNet().double(), 1))
    for number in range(5):
        given = tuple(moved(x, "cpu", torch.float64) for x in images())
        before = workers.pool.sequence
        fast.step(given, number)
    assert workers.pool.sequence == before + 2
    counters = workers.device.read_counters(wait=True)
    assert counters is not None
    assert (counters[STEP], counters[workers.links[0].progress]) == (9, 9)


def test_several_forwards_before_a_backward(made: list[Captured]) -> None:
    """The second one crosses uncaptured, in slots of its own."""

    pair = pair_of()
    before = made[0].replays
    pair.both(two_forwards)
    assert made[0].replays == before + 1


def test_kept_graphs(made: list[Captured]) -> None:
    pair_of().both(kept_graph)


def test_gradients_of_inputs_and_of_gradients(made: list[Captured]) -> None:
    pair_of().both(gradient_penalty)


def test_outputs_and_gradients_stay_valid(made: list[Captured]) -> None:
    pair_of().both(kept_results)


def test_evaluation_between_steps(made: list[Captured]) -> None:
    pair_of().both(evaluation)
    assert [graph.replays for graph in made] == [3, 2, 2]


def test_part_of_the_gradients(made: list[Captured]) -> None:
    """Each combination of outputs has a backward of its own."""

    def use(model: nn.Module) -> list[Tensor]:
        found = []
        for pick in ((0, 1), (0,), (1,), (0, 1), (1,), (0,), (1,)):
            model.zero_grad()
            outputs = model(inputs())
            sum(outputs[i].square().sum() for i in pick).backward()  # type: ignore[union-attr]
            found += [p.grad for p in model.parameters() if p.grad is not None]
        return found

    Pair(lambda model: on_captured_workers(model, 3), Heads, calls=0).both(use)
    assert made[0].replays == 5


def test_parameters_that_move(made: list[Captured]) -> None:
    """What the workers are bound to is part of a recording."""

    def move(model: nn.Module) -> Tensor:
        for p in model.parameters():
            p.data = p.data.clone() * 2
        return step(model)

    pair = pair_of()
    for _ in range(captured.MOST_RECORDINGS):
        pair.both(move)
        pair.both(step)
        pair.both(step)
    before = made[0].replays
    pair.both(step)
    assert before < 3 + 2 * captured.MOST_RECORDINGS, "after so many moves it is not recorded again"


def test_settings_are_followed(made: list[Captured]) -> None:
    assert_settings_are_followed(pair_of(), made)


def test_a_backward_is_recorded_under_its_own_settings(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another network may have been called under others since."""
    seen: list[tuple[object, object]] = []
    record = Coordinator.record

    def noting(self: Coordinator, relay: Relay) -> None:
        seen.append((self.flags, modes.flags()))
        record(self, relay)

    pair, other = pair_of(), pair_of(lambda: Three(12))
    monkeypatch.setattr(Coordinator, "record", noting)
    with torch.backends.mkldnn.flags(enabled=False):
        pair.both(step)  # recorded anew from here on
        pair.both(step)
        loss = [network(inputs()).square().mean() for network in (pair.fast, pair.plain)]
    other.fast(inputs())
    with torch.backends.mkldnn.flags(enabled=False):
        for one in loss:
            one.backward()
    assert len(seen) == 2
    assert all(noted == now for noted, now in seen)


def test_a_worker_that_does_not_answer_is_asked_again(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = Coordinator.wait_recorded

    def late(self: Coordinator, relay: Relay) -> None:
        monkeypatch.setattr(Coordinator, "wait_recorded", wait)
        raise NotNow("a worker has not recorded its part within 2 s")

    monkeypatch.setattr(Coordinator, "wait_recorded", late)
    pair = pair_of()
    pair.both(step)
    assert made[0].replays > 0
    assert "cannot be captured" not in capfd.readouterr().err


def test_a_worker_has_its_time_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a replay takes in all; the lead is always one step ahead here."""
    link, now_s = Link(1, None, done=4, progress=5), 0.0  # type: ignore[arg-type]
    monkeypatch.setattr(link_module.time, "monotonic", lambda: now_s)
    steps = tuple(SimpleNamespace(seq=number) for number in range(1, 5))
    link.owed.append(Replayed(SimpleNamespace(seq=7), steps, 0.0))  # type: ignore[arg-type]
    counters, stalled_s = [0] * 8, []
    counters[SUBMITTED] = 7
    for progress in (0, 1, 2, 2):
        now_s += 0.5
        counters[5], counters[STEP] = progress, progress + 1
        link.settle(counters, streams=True)
        stalled_s.append(link.stalled_s())
    assert stalled_s == [0.5, 0.0, 0.0, 0.5]


def test_a_lead_that_raises_leaves_nobody_waiting(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    release = Relay.release

    def raising(self: Relay, crossing: Crossing) -> None:
        monkeypatch.undo()
        raise RuntimeError("planted: an error in the middle of a replay")

    for _ in range(2):
        monkeypatch.setattr(Relay, "release", raising)
        with pytest.raises(RuntimeError, match="planted"):
            step(pair.fast)
        assert Relay.release is release
        pair.both(step)


def test_what_a_worker_cannot_record_runs_uncaptured(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refusing(self: Coordinator, relay: Relay) -> None:
        raise NotShippable("in worker 1: planted")

    monkeypatch.setattr(Coordinator, "wait_recorded", refusing)
    pair_of()
    assert made[0].replays == 0
    assert "cannot be captured, it runs uncaptured (NotShippable: in worker 1: planted)" in capfd.readouterr().err


def test_a_backward_that_cannot_be_recorded(
    made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It crosses uncaptured, from the activations of the recorded forward."""
    monkeypatch.setattr(Relay, "room", lambda *_: pytest.fail("not asked for"))
    wait = Coordinator.wait_recorded

    def refusing(self: Coordinator, relay: Relay) -> None:
        wait(self, relay)
        if relay.steps[0].gathering is not None:
            raise NotShippable("in worker 1: planted")

    monkeypatch.setattr(Coordinator, "wait_recorded", refusing)
    pair = pair_of()
    pair.both(step)
    assert made[0].replays == 3
    assert capfd.readouterr().err.count("a backward pass cannot be captured") == 1


def test_a_dropped_network_is_forgotten_by_the_workers(made: list[Captured], workers: Coordinator) -> None:
    with workers.lock:
        workers._tidy()
    before = workers.counts()[1]
    pair = pair_of()
    made.clear()
    del pair
    torch._dynamo.reset()
    gc.collect()
    with workers.lock:
        workers._tidy()
    after = workers.counts()[1]
    assert (after.jobs, after.kept) == (before.jobs, before.kept)
    assert not workers.links[0].recorded


def test_a_plan_is_pinned(made: list[Captured], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    text = saved_plan(monkeypatch, path, on_two)
    assert "captured\nregion 0: " in text
    assert "worker 1" in text
    monkeypatch.setattr(Planner, "captures", True)
    made.clear()
    train_pinned(monkeypatch, path)
    assert [graph.replays for graph in made] == [2]


def test_networks_in_two_threads(made: list[Captured]) -> None:
    """Replays follow each other; what is bound to other parameters meanwhile is not replayed with them."""

    def train(model: nn.Module, seed: int, losses: list[float]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for number in range(12):
            optimizer.zero_grad()
            loss = model(inputs(100 * seed + number)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    torch.manual_seed(0)
    plain = [Three(8).double() for _ in range(2)]
    fast = [on_captured_workers(copy.deepcopy(model), 2) for model in plain]
    for model in fast:  # Dynamo compiles in one thread at a time
        train(model, 9, [])
    for model in plain:
        train(model, 9, [])
    found: list[list[float]] = [[], []]
    threads = [threading.Thread(target=train, args=(fast[i], i, found[i])) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wanted: list[list[float]] = [[], []]
    for i, model in enumerate(plain):
        train(model, i, wanted[i])
    for i in range(2):
        assert found[i] == pytest.approx(wanted[i], rel=1e-9)
