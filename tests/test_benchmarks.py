"""The benchmark on a CPU: all engines on a tiny network, engines that fail, a run that goes on."""

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

from benchmarks import captured_host, matrix, page, steps
from benchmarks.cases import NETWORKS, TRIAL, Case, Network, chosen
from benchmarks.engines import ENGINES
from benchmarks.results import Results
from mpsrun.run import state
from mpsrun.run.coordinator import Coordinator

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
    assert turns == [*cells, *cells]
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
    assert {"speed-up", "regret"} <= set(row)


@pytest.mark.slow
def test_torchs_compiler(workers: Coordinator) -> None:
    row = matrix.measure(TRIAL_CASE, ["eager", "compile"], 1, 1, ["compile"])
    assert row["engines"]["compile"]["deviation"]["gradients"] < 1e-4


def test_a_failing_engine_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory\nmore lines")

    def stumble(model: nn.Module, *_: Any) -> Any:
        calls = iter(range(8))

        def call(x: torch.Tensor) -> torch.Tensor:
            if next(calls) == 7:  # in the first repeat, after six steps of warm-up
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
    """Three sides take turns: as it is, with recordings that submit nothing, and what any step costs."""
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
    assert replays == [True, False, False] * 2
    assert quiet[0].recordings == 2  # forward and backward
    sides = [row[name] for name in ("captured", "without its replays", "guards and AccumulateGrad alone")]
    assert all(0 < low <= median <= high for median, low, high in sides)
    assert sides[0][0] > sides[1][0]
    assert row["beyond them"] == pytest.approx(sides[1][0] - sides[2][0], abs=0.2)


def test_the_least_step_hands_out_all_gradients() -> None:
    model = TRIAL_CASE.of.make()
    least = captured_host.Least(TRIAL_CASE, model)
    for _ in range(2):
        least.clear()
        least.step()
    first = [p.grad.clone() for p in least.model.parameters()]
    least.step()  # they add up
    assert any(gradient.any() for gradient in first)
    for p, gradient in zip(least.model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


def test_what_is_not_captured_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_host.Quiet, "around", lambda *_: SimpleNamespace(era=0, make_room=refuse))
    with pytest.raises(RuntimeError, match="expected trial-4 to be captured"):
        captured_host.captured_host(TRIAL_CASE, 1, 1)


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

    def call(*args: str) -> None:
        common = ["--json", str(tmp_path / "bench.json"), "--parts", "", "--repeats", "1", "--steps", "1"]
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


@pytest.mark.parametrize(("option", "value"), [("--only", "nix"), ("--engines", "nix"), ("--parts", "nix")])
def test_a_name_that_does_not_exist(bench: Any, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(option, value)
    assert "found nix" in capsys.readouterr().err
