"""Shares of a GPU's multiprocessors, and convolutions tuned beside their siblings: same results as plain PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import noted, on_captured
from networks import SMALL, Three, why_not_here
from torch import nn
from transparency import assert_same, assert_transparent, moved, trained

from mpsrun.device.shares import GreenContexts, shares
from mpsrun.plan import candidates
from mpsrun.plan.lanes import LEAD, WHOLE
from mpsrun.plan.plan import Assignment
from mpsrun.run import report, special
from mpsrun.run.backend import mpsrun
from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.cotuning import TunedRecorder
from mpsrun.run.recorder import recorder
from mpsrun.run.streams import CudaSides

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SHARE = 40  # of three lanes the third overlaps with the first


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch._dynamo.reset()
    report.graphs.clear()
    return noted(monkeypatch)


@pytest.fixture
def gpu(daemon: None) -> GreenContexts:
    """The shares of a client of CUDA MPS."""
    found = shares(torch.device("cuda", 0))
    assert isinstance(found, GreenContexts), found.refusal
    return found


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, daemon: None) -> None:
    """Every lane but the lead's has a share."""
    planner = candidates._Planner
    for name in ("on_streams", "forced"):
        choose = getattr(planner, name)
        monkeypatch.setattr(planner, name, lambda *args, choose=choose: with_shares(choose(*args)))


def with_shares(choice: Any) -> Any:
    if not isinstance(choice, Assignment):
        return choice
    return replace(choice, shares=tuple(WHOLE if lane == LEAD else SHARE for lane in choice.lanes))


def multiprocessors(stream: torch.cuda.Stream) -> int:
    """How many of them what is submitted to a stream may use."""
    from cuda.bindings import driver

    status, context = driver.cuStreamGetGreenCtx(driver.CUstream(stream.cuda_stream))
    assert status == driver.CUresult.CUDA_SUCCESS, status
    if not int(context):  # the process's own context
        return torch.cuda.get_device_properties(0).multi_processor_count
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    status, found = driver.cuGreenCtxGetDevResource(context, kind)
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return int(found.sm.smCount)


def test_a_stream_has_its_share(gpu: GreenContexts) -> None:
    everything = torch.cuda.get_device_properties(0).multi_processor_count
    for percent in (10, 25, 50, 75):
        assert multiprocessors(gpu.stream(-1, 0, percent)) == pytest.approx(everything * percent / 100, abs=9)
    assert multiprocessors(gpu.stream(-1, 60, 60)) == pytest.approx(everything * 0.6, abs=9)  # around the end
    assert multiprocessors(torch.cuda.Stream()) == everything


def test_a_recording_keeps_the_share(gpu: GreenContexts) -> None:
    """A quarter takes about four times as long; that it takes twice as long cannot be noise."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    quarter = gpu.stream(-1, 0, 25)

    def narrow() -> torch.Tensor:
        main = torch.cuda.current_stream()
        quarter.wait_stream(main)
        with torch.cuda.stream(quarter):
            result = a @ a
        main.wait_stream(quarter)
        return result

    torch.testing.assert_close(narrow(), a @ a)
    limited, whole = (recorder(torch.device("cuda", 0)).record(function) for function in (narrow, lambda: a @ a))
    assert least_ms(limited.replay) > 2 * least_ms(whole.replay)
    torch.testing.assert_close(limited.replay(), a @ a)


def least_ms(run: Callable[[], object]) -> float:
    found = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return min(found)


@pytest.mark.parametrize("lanes", ["captured", "streams"])
@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks_on_side_streams(shared: None, sides: None, lanes: str, name: str) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on(lanes, copy.deepcopy(plain.model)))
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(5):
            given = tuple(moved(x, "cuda", torch.float64) for x in case.inputs())
            assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    (graph,) = report.graphs
    assert any(f"at {SHARE}%" in lane for region in graph.regions for lane in region.shown)


def on(lanes: str, model: nn.Module) -> nn.Module:
    model.compile(backend=mpsrun, options={"lanes": lanes})
    return model


@pytest.mark.parametrize("name", ["pathnet", "googlenet", "dropout", "batch norm", "heads"])
def test_small_networks_on_workers(shared: None, on_gpu: Coordinator, name: str) -> None:
    """A worker changes its share from one region to the next, and back to the whole GPU."""
    case = SMALL[name]
    used = None if name == "dropout" else case.used
    options = {"used": used, "forward_only": case.forward_only, "device": "cuda"}
    assert_transparent(case.model, case.inputs, 4, case.regions, **options)  # type: ignore[arg-type]
    assert any(f"at {SHARE}%" in lane for region in report.graphs[-1].regions for lane in region.shown)


def test_lanes_have_their_shares_and_the_trunk_the_whole_gpu(shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = torch.cuda.get_device_properties(0).multi_processor_count
    found: dict[int, set[int]] = {}
    use, join = CudaSides.use, CudaSides.join

    def note(lane: int) -> None:
        found.setdefault(lane, set()).add(multiprocessors(torch.cuda.current_stream()))

    monkeypatch.setattr(CudaSides, "use", lambda self, lane: (use(self, lane), note(lane)))
    monkeypatch.setattr(CudaSides, "join", lambda self, outputs: (join(self, outputs), note(LEAD)))
    model = on("streams", Three(16).to("cuda"))
    for _ in range(3):
        model(torch.randn(5, 6, device="cuda")).sum().backward()
    assert found.pop(LEAD) == {everything}
    assert found
    for counts in found.values():
        assert max(counts) == pytest.approx(everything * SHARE / 100, abs=9)


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, daemon: None) -> None:
    """Captured plans have their convolutions tuned beside each other, as where a script sets `benchmark`."""
    forced = special.forced_captured
    monkeypatch.setattr(
        special, "forced_captured", lambda *args: replace(found := forced(*args), plan=replace(found.plan, tuned=True))
    )
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.mark.parametrize("shares", [False, True], ids=["whole GPU", "shares"])
@pytest.mark.parametrize("name", ["googlenet", "inception", "channels last", "dropout"])
def test_tuned_convolutions(
    tuning: None,
    request: pytest.FixtureRequest,
    made: list[Captured],
    capfd: pytest.CaptureFixture[str],
    name: str,
    shares: bool,
) -> None:
    """Tuning leaves no trace in parameters, buffers and generators; other algorithms differ by rounding."""
    if shares:
        request.getfixturevalue("shared")
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    for step in range(6):
        given = tuple(moved(x, "cuda", torch.float64) for x in case.inputs())
        assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    assert [graph.replays for graph in made] == [4]
    assert isinstance(made[0]._recorder, TunedRecorder)
    assert "convolutions beside their siblings: " in capfd.readouterr().err


def test_tuning_that_fails_leaves_everything_as_it_was(
    tuning: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A branch that waits for the GPU cannot be replayed beside its siblings."""
    from mpsrun.run.profile import Step

    forward = Step.forward

    def waiting(self: Step) -> tuple[torch.Tensor, ...]:
        torch.cuda.synchronize()
        return forward(self)

    monkeypatch.setattr(Step, "forward", waiting)
    case = SMALL["googlenet"]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    for step in range(5):
        given = tuple(moved(x, "cuda", torch.float64) for x in case.inputs())
        assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    assert made[0].replays == 3
    assert "keep the algorithms that are fastest alone" in capfd.readouterr().err
