"""The benchmark on a CPU: all engines on a tiny network, engines that fail, a run that goes on, the page."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

from benchmarks import matrix, page, steps
from benchmarks.cases import NETWORKS, TRIAL, Case, Network, chosen
from benchmarks.engines import ENGINES
from benchmarks.results import Results
from mpsrun.run import state
from mpsrun.run.coordinator import Coordinator

ROOT = Path(__file__).parent.parent
(TRIAL_CASE,) = chosen(["trial"])
ON_CPU = ["eager", "cuda graph", "mpsrun serial", "mpsrun workers", "mpsrun auto"]
RUN = {"gpu": "a GPU", "torch": "2.13.0", "commit": "abc1234"}


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
    assert cells["mpsrun auto"]["set-up"]["steps"] == 100
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


@pytest.mark.parametrize(("option", "value"), [("--only", "nix"), ("--engines", "nix"), ("--parts", "nix")])
def test_a_name_that_does_not_exist(bench: Any, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(option, value)
    assert "found nix" in capsys.readouterr().err


# --- the page ----------------------------------------------------------------------------------------------------


def cell(median: float, **more: Any) -> dict[str, Any]:
    times = {"ms": [median, median - 1, median + 1], "set-up": {"s": 2.5, "steps": 6, "extra s": 2.0}}
    return times | {"deviation": {"loss": 0.0, "gradients": 2e-7}} | more


def made(network: str, **medians: float) -> dict[str, Any]:
    cells = {name.replace("_", " "): cell(median) for name, median in medians.items()}
    return {"network": network, "batch": 8, "dtype": "tf32", "engines": cells} | matrix.judge(cells)


def sample() -> Results:
    results = Results()
    fast = made("fast", eager=40.0, mpsrun_serial=40.0, mpsrun_workers=10.0, mpsrun_auto=10.0)
    slow = made("slow", eager=10.0, mpsrun_serial=10.0, mpsrun_workers=12.0, mpsrun_auto=10.5)
    slow["engines"]["cuda graph"] = {"failed": "RuntimeError: no | graph"}
    for row in (fast, slow, {"network": "absent", "batch": 8, "skipped": "timm is not installed"}):
        results.put_row(row, RUN)
    results.put_part({"part": "GPU-side hand-off, one way, us", "mean": 2.3}, RUN)
    return results


def test_judge() -> None:
    cells = {"eager": cell(12.0), "mpsrun serial": cell(11.0), "mpsrun workers": cell(5.0), "mpsrun auto": cell(6.0)}
    assert matrix.judge(cells) == {"speed-up": 2.0, "regret": 0.2}
    cells["mpsrun workers"] = {"failed": "lost"}
    assert matrix.judge(cells) == {"speed-up": 2.0, "regret": -0.4545}
    assert matrix.judge({"eager": cell(12.0)}) == {}


def test_the_page(tmp_path: Path) -> None:
    page.write(sample(), tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    words = " ".join(text.split())
    assert "1.95x in the geometric mean of 2 rows, 0.95x in the worst case (slow 8)" in words
    assert "+5.0% of the time in the worst case (slow 8)" in words
    assert "Measured on gpu a GPU, torch 2.13.0, commit abc1234." in text
    fast = next(line for line in text.splitlines() if line.startswith("| fast | 8 | tf32"))
    assert "| 40.00 (39.00 to 41.00) | - |" in fast
    assert "**10.00 (9.00 to 11.00) 4.00x**" in fast
    assert "- slow 8, cuda graph: RuntimeError: no | graph" in text
    assert "- absent 8: timm is not installed" in text
    assert "- GPU-side hand-off, one way, us: mean 2.3" in text
    assert "![speed-up over eager](benchmarks.svg)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for table in (rows[:4], rows[4:]):
        assert len({line.count(" | ") for line in table}) == 1


def test_the_chart(tmp_path: Path) -> None:
    page.write(sample(), tmp_path / "benchmarks.md")
    root = ET.parse(tmp_path / "benchmarks.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "4.00x" in texts
    assert "fast 8" in texts
    assert "absent 8" not in texts
    bars = [float(e.get("width", "0%").rstrip("%")) for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert max(bars[1:]) / min(bars[7:]) == pytest.approx(4 / (10 / 12), rel=0.01)  # behind background and legend


def test_an_empty_page() -> None:
    assert "## Times" in page.page(Results(), "chart.svg")


def test_the_file_round_trips(tmp_path: Path) -> None:
    results = sample()
    results.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results
    assert Results.read(tmp_path / "none.json") == Results()
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
