"""The benchmark on a CPU: all engines on a tiny network, engines that fail, a run that goes on."""

import contextlib
import copy
import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bound, by_hand, captured_host, matrix, memory, page, parts, steps
from benchmarks.cases import NETWORKS, TRIAL, Case, Input, Network, chosen
from benchmarks.engines import AUTO, ENGINES, SLOW
from benchmarks.results import Results
from examples.networks import GoogLeNet
from mpsrun.run import plans, report, state
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.demand import Demand
from mpsrun.run.plan_cache import Entry, Key
from mpsrun.run.profile import Alone

ROOT = Path(__file__).parent.parent
(TRIAL_CASE,) = chosen(["trial"])
ON_CPU = ["eager", "cuda graph", "mpsrun serial", "mpsrun workers", "mpsrun auto"]


@pytest.fixture
def _settings() -> Iterator[None]:
    """What the benchmark sets for its process is put back."""
    before = state.flags()
    yield
    state.apply_flags(before)


def test_engines_take_turns_and_compute_the_same(workers: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    plain = steps.Stepper.time_steps

    def noted(self: steps.Stepper, count: int) -> float:
        if count == 2:  # timed; the warm-up has more
            turns.append(engine_of[self])
        return plain(self, count)

    engine_of: dict[steps.Stepper, str] = {}
    build = steps.Stepper.__init__

    def remembered(self: steps.Stepper, case: Case, model: nn.Module, engine: str) -> None:
        engine_of[self] = engine
        build(self, case, model, engine)

    monkeypatch.setattr(steps.Stepper, "time_steps", noted)
    monkeypatch.setattr(steps.Stepper, "__init__", remembered)
    row = matrix.measure(TRIAL_CASE, ON_CPU, 2, 2, ON_CPU)

    cells = row["engines"]
    assert "NVIDIA GPU" in cells.pop("cuda graph")["failed"]
    names = [*cells]
    assert turns == [*names, *names[1:], names[0]]
    for engine, cell in cells.items():
        assert "failed" not in cell, engine
        median, low, high = cell["ms"]
        assert 0 < low <= median <= high
    assert cells["mpsrun workers"]["regions on lanes"] == 1
    assert cells["mpsrun serial"]["regions on lanes"] == 0
    assert cells["mpsrun auto"]["set-up"]["steps"] == 6
    for engine in [*cells][1:]:
        assert cells[engine]["deviation"]["loss"] < 1e-5
        assert cells[engine]["deviation"]["gradients"] < 1e-5
    assert {"speed-up", "regret", "against all", "against no handwork"} <= set(row)


@pytest.mark.slow
def test_torchs_compiler(workers: Coordinator) -> None:
    row = matrix.measure(TRIAL_CASE, ["eager", "compile"], 1, 1, ["compile"])
    assert row["engines"]["compile"]["deviation"]["gradients"] < 1e-4


def test_a_failing_engine_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory\nmore lines")

    def stumble(model: nn.Module, *_: Any) -> Any:
        calls = iter(range(11))

        def call(x: torch.Tensor) -> torch.Tensor:
            if next(calls) == 10:  # in the first repeat, after nine steps of warm-up
                raise ValueError("too many steps")
            return model(x)

        return call

    monkeypatch.setitem(ENGINES, "compile", refuse)
    monkeypatch.setitem(ENGINES, "reduce-overhead", stumble)
    row = matrix.measure(TRIAL_CASE, ["compile", "reduce-overhead", "eager"], 2, 2, [*ENGINES])
    assert row["engines"]["compile"] == {"failed": "OutOfMemoryError: out of memory"}
    assert row["engines"]["reduce-overhead"]["failed"] == "ValueError: too many steps"
    assert "ms" not in row["engines"]["reduce-overhead"]
    assert len(row["engines"]["eager"]["ms"]) == 3


@pytest.mark.parametrize("broken", ["eager", "compile"])
def test_a_comparison_that_fails_leaves_the_times(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "compile", lambda model, *_: model)
    plain = matrix._results

    def results(case: Case, model: nn.Module, engine: str) -> list[torch.Tensor]:
        if engine == broken:
            raise torch.OutOfMemoryError("out of memory")
        return plain(case, model, engine)

    monkeypatch.setattr(matrix, "_results", results)
    row = matrix.measure(TRIAL_CASE, ["eager", "compile"], 1, 1, ["compile"])
    assert row["engines"]["compile"]["deviation"] == {"failed": "OutOfMemoryError: out of memory"}
    assert len(row["engines"]["compile"]["ms"]) == 3
    found = Results()
    found.put_row(row, {})
    assert "- trial 4, compile, deviation: OutOfMemoryError: out of memory" in page.page(found, "")


def test_the_warm_up_waits_for_its_own_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind = report.Graph(undecided={"training of another network"})
    monkeypatch.setattr(report, "graphs", [left_behind])
    stepper = steps.Stepper(TRIAL_CASE, TRIAL_CASE.of.make(), "eager")
    stepper.warm_up()
    assert stepper.warm_up_steps == steps.WARM_UP_STEPS


def test_the_bound_on_a_cpu_is_made_of_wall_time() -> None:
    found = matrix.find_bound(TRIAL_CASE)
    assert 0 < found["ms"] == found["critical path ms"] <= found["one after the other ms"]
    assert set(found) == {"ms", "critical path ms", "one after the other ms"}


def test_a_bound_that_fails_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix.bound, "measure", lambda *_: 1 / 0)
    assert matrix.find_bound(TRIAL_CASE) == {"failed": "ZeroDivisionError: division by zero"}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, step: Demand, branches: list[Demand | None]) -> None:
    """The trial network as if it had been looked at on a GPU: the kernels of a step, and those of its branches."""
    (seen,) = bound.explain.networks(TRIAL_CASE.of.make(), tuple(TRIAL_CASE.make_inputs()))
    alone = [Alone(1.0, 1.0, demand=demand) for demand in branches]
    network = dataclasses.replace(seen, kind="cuda", times={region.index: alone for region in seen.regions})
    monkeypatch.setattr(bound, "device", lambda: "cuda")
    monkeypatch.setattr(bound, "_whole_step", lambda *_: step)
    monkeypatch.setattr(bound, "_networks", lambda *_: [network])


@pytest.mark.parametrize(("full_us", "bound_ms"), [(500.0, 0.7), (900.0, 0.9)])
def test_the_bound(full_us: float, bound_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, Demand(1000.0, full_us), [Demand(us, 1.0) for us in (100.0, 300.0, 200.0)])
    assert bound.measure(TRIAL_CASE, nn.Identity()) == {
        "ms": bound_ms,
        "critical path ms": 0.7,  # 1000 - (100 + 300 + 200) + 300
        "one after the other ms": 1.0,
        "full GPU ms": full_us / 1000,
    }


def test_one_branch_after_the_other_is_a_way_to_run_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, Demand(1000.0, 500.0), [Demand(us, 1.0) for us in (100.0, 3000.0, 200.0)])
    assert bound.measure(TRIAL_CASE, nn.Identity())["ms"] == 1.0


def test_a_bound_needs_all_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, Demand(1000.0, 500.0), [Demand(100.0, 1.0), None, Demand(100.0, 1.0)])
    with pytest.raises(RuntimeError, match="the profiler told of no kernels"):
        bound.measure(TRIAL_CASE, nn.Identity())


class Gpu:
    """An allocator's figures, MiB: what is held when asked, then the peaks of steps."""

    def __init__(self) -> None:
        self.tidied = 0
        self.now = [(100, 120), (140, 200)]

    def tidy(self) -> None:
        self.tidied += 1

    def held(self) -> tuple[int, int]:
        allocated, reserved = self.now.pop(0)
        return allocated << 20, reserved << 20

    def peak(self, steps: Any) -> tuple[int, int]:
        steps()
        return 500 << 20, 640 << 20


def test_memory_of_others_is_not_an_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, links = Gpu(), [SimpleNamespace(pid=10, lost=None), SimpleNamespace(pid=11, lost=None)]
    owner = SimpleNamespace(links=links, arena_bytes=48 << 20)
    monkeypatch.setattr(memory, "allocator", lambda: gpu)
    monkeypatch.setattr(memory.session, "current", lambda: owner)
    monkeypatch.setattr(memory.nvml, "memory_by_pid", lambda: {10: 600, 11: 500, 12: 9000})
    cells: matrix.Cells = {"eager": {}, "mpsrun auto": {}}
    monkeypatch.setitem(ENGINES, "mpsrun auto", lambda model, *_: model)
    matrix.time_engines(TRIAL_CASE, TRIAL_CASE.of.make(), cells, 1, 1)
    assert cells["eager"]["memory"] == {"reserved MiB": 520.0, "allocated MiB": 400.0}
    lead = {"reserved MiB": 440.0, "allocated MiB": 360.0}
    assert cells["mpsrun auto"]["memory"] == lead | {"workers": 2, "workers MiB": 1148}
    assert gpu.tidied == 4  # before each engine, and before the steps that are looked at

    monkeypatch.setattr(memory.nvml, "memory_by_pid", lambda: {10: 600, 11: 0})  # a driver that does not tell
    gpu.now = [(0, 0)]
    assert memory.Meter(gpu).measure(lambda: None, True)["workers MiB"] is None


@pytest.mark.parametrize("name", ["towers", "pathnet", "two-towers", "ensemble", "wide", "inception", "hrnet"])
def test_branches_by_hand_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name, 2, NETWORKS[name])
    if why := case.why_not_here():
        pytest.skip(why)
    forks: list[int] = []
    plain = by_hand.beside

    def counted(*branches: Any, first: int = 0) -> list[torch.Tensor]:
        forks.append(len(branches))
        return plain(*branches, first=first)

    monkeypatch.setattr(by_hand, "beside", counted)
    assert_same_by_hand(case)
    assert len(forks) == {"pathnet": 6, "inception": 15, "hrnet": 16}.get(name, 1)
    assert min(forks) > 1


def test_inception_by_hand_computes_the_same() -> None:
    small = lambda: GoogLeNet(5, 0.1, stem_stride=1)  # noqa: E731
    assert_same_by_hand(Case("googlenet", 2, Network(small, (Input((3, 16, 16)),), (2,))))


def assert_same_by_hand(case: Case) -> None:
    torch.manual_seed(0)
    model = case.of.make()
    other = copy.deepcopy(model)
    by_hand.put_on_streams(other)
    inputs = case.make_inputs()
    losses = [case.of.loss(network(*inputs)) for network in (model, other)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Value:
    """A tensor on a GPU that is not there."""

    is_cuda = True

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"{self.name} lent to {stream.name}")


def test_the_order_of_streams_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    numbers = iter(range(9))
    current = [Stream(log, "main")]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(by_hand, "_streams", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(log, f"side {next(numbers)}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)

    def branch(name: str) -> Any:
        def run(_value: Value) -> Value:
            log.append(f"{name} on {current[-1].name}")
            return Value(log, name)

        return run

    x = Value(log, "x")
    assert [value.name for value in by_hand.beside((branch("a"), x), (branch("b"), x), first=1)] == ["a", "b"]
    assert log == [
        "side 1 waits for event of main",
        "x lent to side 1",
        "a on side 1",
        "side 2 waits for event of main",
        "x lent to side 2",
        "b on side 2",
        "main waits for side 1",
        "a lent to main",
        "main waits for side 2",
        "b lent to main",
    ]


def test_a_network_that_nobody_split_by_hand() -> None:
    with pytest.raises(ValueError, match="found none in Linear"):
        by_hand.put_on_streams(nn.Linear(2, 2))


class Generator:
    """That of a GPU, at some place of its sequence."""

    def __init__(self, _device: Any = None) -> None:
        self.place: Any = ("seed", "offset")

    def initial_seed(self) -> Any:
        return self.place[0]

    def get_offset(self) -> Any:
        return self.place[1]

    def manual_seed(self, seed: Any) -> "Generator":
        self.place = (seed, 0)
        return self

    def set_offset(self, offset: Any) -> None:
        self.place = (self.place[0], offset)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state_of = other


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that is only asked for captures: their options; pools left in the state of a capture; its generator."""
    seen = SimpleNamespace(options=[], open_pools=[], generator=Generator(), fails=False)

    def graphed(model: Any, _inputs: Any, allow_unused_input: bool, pool: Any) -> Any:
        assert allow_unused_input
        torch.cuda.graph("graph", pool=pool, capture_error_mode="global")
        seen.open_pools.append(pool)
        if seen.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        seen.open_pools.remove(pool)
        return model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "default_generators", (seen.generator,))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, **options: seen.options.append(options))
    end = lambda _device, pool: seen.open_pools.remove(pool)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return seen


@pytest.mark.parametrize("engine", ["cuda graph", "compile in graph", "streams in graph"])
def test_captures_are_those_of_their_thread(engine: str, captures: SimpleNamespace) -> None:
    before = torch.cuda.graph
    ENGINES[engine](TRIAL_CASE.of.make(), [torch.ones(2)], False)
    assert captures.options == [{"pool": (0, 7), "capture_error_mode": "thread_local"}]
    assert torch.cuda.graph is before


def test_after_a_capture_that_fails_others_can_be_measured(captures: SimpleNamespace) -> None:
    captures.fails, before = True, torch.cuda.graph
    with pytest.raises(RuntimeError, match="not permitted"):
        ENGINES["cuda graph"](nn.Linear(2, 2), [torch.ones(2)], False)
    assert captures.open_pools == []
    assert captures.generator.state_of.place == ("seed", "offset")
    assert torch.cuda.graph is before


def test_a_wrong_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "compile", lambda model, *_: lambda x: 1.01 * model(x))
    row = matrix.measure(TRIAL_CASE, ["compile"], 1, 1, ["compile"])
    assert row["engines"]["compile"]["deviation"]["gradients"] == pytest.approx(0.0201, rel=0.01)


@pytest.mark.usefixtures("_settings")
def test_settings_are_put_back() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    before = state.flags()
    seen = []

    def look(model: nn.Module, *_: Any) -> nn.Module:
        seen.append(torch.backends.cudnn.allow_tf32)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "compile", look)
        matrix.measure(TRIAL_CASE, ["compile"], 1, 1, ["compile"])
    assert seen == [True, False]
    assert state.flags() == before


@pytest.mark.parametrize("name", ["two-towers", "ensemble", "wide"])
def test_own_networks_fork(name: str) -> None:
    from mpsrun.graph.effects import analyze, drop_inert
    from mpsrun.graph.regions import find_regions

    found = []

    def look(gm: torch.fx.GraphModule, _: object) -> object:
        drop_inert(gm)
        found.append([region for region in find_regions(gm, analyze(gm)).regions if region.parent is None])
        return gm.forward

    case = Case(name, 2, NETWORKS[name])
    loss = case.of.loss(torch.compile(case.of.make(), backend=look)(*case.make_inputs()))
    loss.backward()
    (regions,) = found
    assert [len(region.branches) for region in regions] == [4 if name == "ensemble" else 2]


def test_names() -> None:
    assert [case.name for case in chosen(["googlenet-8", "towers"])] == ["googlenet-8", "towers-4", "towers-16"]
    assert chosen([]) == []
    assert "trial" not in {case.network for case in chosen(None)}
    with pytest.raises(ValueError, match="found googlenet-9"):
        chosen(["googlenet-9"])


def test_a_package_that_is_not_there() -> None:
    case = Case("x", 1, Network(nn.Identity, (), (1,), needs="no_such_package"))
    assert case.why_not_here() == "no_such_package is not installed"
    assert TRIAL_CASE.why_not_here() is None


def test_what_a_captured_step_costs_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides take turns: as it is, with recordings that submit nothing, and what any step costs, in either thread."""
    replays: list[bool] = []
    plain = captured_host.lead_us
    quiet: list[captured_host.Quiet] = []

    class Noted(captured_host.Quiet):
        def __init__(self) -> None:
            super().__init__()
            quiet.append(self)

    def counted(stepper: steps.Stepper, count: int) -> float:
        replays.append(quiet[0].submits)
        return plain(stepper, count)

    monkeypatch.setattr(captured_host, "Quiet", Noted)
    monkeypatch.setattr(captured_host, "lead_us", counted)
    row = captured_host.captured_host(TRIAL_CASE, 2, 2)
    assert replays == [True, False, False, False] * 2
    assert quiet[0].recordings == 2  # forward and backward
    sides = [row[name] for name in ("captured", "without its replays", "these in the calling thread")]
    sides.append(row["guards and AccumulateGrad alone"])
    assert all(0 < low <= median <= high for median, low, high in sides)
    assert sides[0][0] > sides[1][0]
    assert row["beyond them"] == pytest.approx(sides[1][0] - sides[2][0], abs=0.2)


@pytest.mark.parametrize("in_calling_thread", [True, False])
def test_the_least_step_hands_out_all_gradients(in_calling_thread: bool) -> None:
    model = TRIAL_CASE.of.make()
    least = captured_host.Least(TRIAL_CASE, model, in_calling_thread)
    for _ in range(2):
        least.clear()
        least.step()
    first = [p.grad.clone() for p in least.model.parameters()]
    least.step()  # they add up
    assert any(gradient.any() for gradient in first)
    for p, gradient in zip(least.model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
    assert torch._C._is_multithreading_enabled() is not in_calling_thread


def test_what_is_not_captured_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        captured_host.Quiet, "around", lambda *_: SimpleNamespace(era=0, has_workers=False, make_room=refuse)
    )
    with pytest.raises(RuntimeError, match="expected trial-4 to be captured"):
        captured_host.captured_host(TRIAL_CASE, 1, 1)


def test_what_trying_plans_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first of each pair finds an empty cache, the second what the first has left there."""
    seen: list[bool] = []
    key = Key(graph="", shapes="", device="", driver="", torch="", mpsrun="", workers=0, mps="")

    class Told(steps.Stepper):
        def warm_up(self) -> float:
            cache = plans.cache()
            seen.append(cache.load(key) is not None)
            cache.store(key, Entry(candidate="serial", plan=""))
            self.warm_up_steps = 10 if seen[-1] else 40
            return 2.0 if seen[-1] else 6.0

        def time_steps(self, count: int) -> float:
            return 50.0

    monkeypatch.setattr(parts, "Stepper", Told)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch._dynamo.config.recompile_limit
    row = parts.tuning(TRIAL_CASE)
    assert torch._dynamo.config.recompile_limit == before, "which compiling in place changes"
    assert seen == [False, False, True, False, True, False, True]
    assert row["plans to be tried"] == [4.0, 4.0, 4.0]
    assert row["plan from the cache"] == [1.5, 1.5, 1.5]
    assert row["profiling and trying"] == 2.5


def refuse() -> None:
    raise torch.OutOfMemoryError("no memory for a recording")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _settings: None) -> Any:
    """`scripts/bench` as a function of its arguments, with one file for the figures."""
    loader = importlib.machinery.SourceFileLoader("bench_script", str(ROOT / "scripts" / "bench"))
    spec = importlib.util.spec_from_loader("bench_script", loader)
    assert spec is not None
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)

    def call(*args: str) -> None:  # without bounds, where they are not asked for
        common = [
            "--json",
            str(tmp_path / "bench.json"),
            "--parts",
            "",
            "--repeats",
            "1",
            "--steps",
            "1",
            "--no-bounds",
        ]
        monkeypatch.setattr(sys, "argv", ["bench", *common, *args])
        module.main()

    return call


def test_a_run_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPSRUN_COMMIT", "abc1234")
    monkeypatch.setitem(TRIAL, "trial", dataclasses.replace(TRIAL["trial"], batches=(2, 4)))
    bench("--only", "trial", "--minutes", "0")
    bench("--only", "trial-2", "--engines", "eager")
    first = Results.read(tmp_path / "bench.json")
    assert [row["batch"] for row in first.rows] == [2]  # none was started in no minutes at all
    assert first.runs[0]["commit"] == "abc1234"

    monkeypatch.setenv("MPSRUN_COMMIT", "def5678")
    bench("--only", "trial", "--engines", "eager")
    second = Results.read(tmp_path / "bench.json")
    assert second.rows[0] == first.rows[0]
    assert [(row["batch"], row["run"]) for row in second.rows] == [(2, 0), (4, 1)]

    capsys.readouterr()
    bench("--only", "trial-2", "--engines", "eager,cuda graph", "--again", "--page", str(tmp_path / "page.md"))
    assert json.loads(capsys.readouterr().out)["batch"] == 2
    third = Results.read(tmp_path / "bench.json")
    assert [(row["batch"], row["run"]) for row in third.rows] == [(2, 1), (4, 1)]
    assert set(third.rows[0]["engines"]) == {"eager", "cuda graph"}
    assert "- trial 2, cuda graph: RuntimeError: needs an NVIDIA GPU" in (tmp_path / "page.md").read_text()


def test_a_skipped_row_is_tried_again(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = TRIAL["trial"]
    monkeypatch.setitem(TRIAL, "trial", dataclasses.replace(there, needs="no_such_package"))
    bench("--only", "trial")
    assert "no_such_package" in json.loads((tmp_path / "bench.json").read_text())["rows"][0]["skipped"]
    monkeypatch.setitem(TRIAL, "trial", there)
    bench("--only", "trial", "--engines", "eager")
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert "skipped" not in row
    assert "ms" in row["engines"]["eager"]


def test_a_lost_worker_ends_the_run(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = [SimpleNamespace(index=1, lost=None), SimpleNamespace(index=2, lost="killed")]
    monkeypatch.setattr(matrix.session, "current", lambda: SimpleNamespace(links=links))
    monkeypatch.setitem(TRIAL, "trial", dataclasses.replace(TRIAL["trial"], batches=(2, 4)))
    with pytest.raises(SystemExit, match="trial-2: worker 2 was lost: killed; run again"):
        bench("--only", "trial", "--engines", "eager")
    results = Results.read(tmp_path / "bench.json")
    assert [row["batch"] for row in results.rows] == [2]
    assert "- trial 2: worker 2 was lost: killed" in page.page(results, "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Nothing is measured; which engines should be timed and compared."""
    engines: list[list[str]] = []

    def measured(case: Case, timed: list[str], _repeats: int, _steps: int, compared: list[str]) -> dict[str, Any]:
        engines.extend([timed, compared])
        return {"network": case.network, "batch": case.batch, "dtype": "fp32", "engines": {AUTO: {"ms": [2.0] * 3}}}

    monkeypatch.setattr(matrix, "measure", measured)
    return engines


def test_nobody_waits_for_inductor_unasked(bench: Any, asked: list[list[str]]) -> None:
    bench("--only", "trial")
    assert asked == [[engine for engine in ENGINES if engine not in SLOW]] * 2


@pytest.mark.usefixtures("asked")
def test_figures_of_several_files(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRIAL, "trial", dataclasses.replace(TRIAL["trial"], batches=(2, 4)))
    for commit, batches in (("abc1234", "trial"), ("def5678", "trial-4")):
        monkeypatch.setenv("MPSRUN_COMMIT", commit)
        bench("--only", batches)
        (tmp_path / "bench.json").rename(tmp_path / f"{commit}.json")
    merged = [f"--merge={tmp_path / commit}.json" for commit in ("abc1234", "def5678")]
    bench("--only", "", *merged, "--page", str(tmp_path / "page.md"))
    results = Results.read(tmp_path / "bench.json")
    commits = [(row["batch"], results.runs[row["run"]]["commit"]) for row in results.rows]
    assert commits == [(2, "abc1234"), (4, "def5678")]
    assert "commit def5678: trial 4." in (tmp_path / "page.md").read_text()


def test_bounds_come_last_and_go_on(
    bench: Any,
    asked: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TRIAL, "trial", dataclasses.replace(TRIAL["trial"], batches=(2, 4, 8)))
    turns: list[Any] = []

    def bounded(case: Case) -> dict[str, Any]:
        turns.append((case.batch, len(asked) // 2))  # how many rows there are by then
        return {"ms": 0.5} if case.batch == 2 else {"failed": "no profiler"}

    monkeypatch.setattr(matrix, "find_bound", bounded)
    monkeypatch.setenv("MPSRUN_COMMIT", "abc1234")
    bench("--only", "trial-2,trial-4", "--bounds")
    assert turns == [(2, 2), (4, 2)]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[2] == {"network": "trial", "batch": 2, "bound": {"ms": 0.5}, "share of the bound": 0.25}
    monkeypatch.setenv("MPSRUN_COMMIT", "def5678")
    bench("--only", "trial-2,trial-4", "--bounds", "--minutes", "0")
    assert "stopped before the bound of trial-4" in capsys.readouterr().out
    bench("--only", "trial", "--bounds")
    assert turns[2:] == [(4, 3), (8, 3)]
    rows = Results.read(tmp_path / "bench.json").rows
    assert [(row["batch"], row["run"], row["bound"]) for row in rows] == [
        (2, 0, {"ms": 0.5}),
        (4, 0, {"failed": "no profiler"}),
        (8, 1, {"failed": "no profiler"}),
    ]


def test_a_file_to_merge_that_is_not_there(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--merge", "nix.json")
    assert "found no nix.json" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--only", "nix"), ("--engines", "nix"), ("--parts", "nix")])
def test_a_name_that_does_not_exist(bench: Any, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(option, value)
    assert "found nix" in capsys.readouterr().err
