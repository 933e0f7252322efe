"""The benchmark's figures on disk, as a page and as a chart, from a made-up sample."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import page
from benchmarks.chart import COLOURS
from benchmarks.judge import judge
from benchmarks.memory import limit_mib, used_mib
from benchmarks.results import Results

RUN = {"gpu": "a GPU", "torch": "2.13.0", "commit": "abc1234"}


def cell(median: float, **more: Any) -> dict[str, Any]:
    times = {"ms": [median, median - 1, median + 1], "set-up": {"s": 2.5, "steps": 6, "extra s": 2.0}}
    return times | {"deviation": {"loss": 0.0, "gradients": 2e-7}} | more


def made(network: str, batch: int = 8, **medians: float) -> dict[str, Any]:
    cells = {name.replace("_", " "): cell(median) for name, median in medians.items()}
    return {"network": network, "batch": batch, "dtype": "tf32", "engines": cells}


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
    row = made("any", eager=12.0, mpsrun_serial=11.0, mpsrun_workers=5.0, mpsrun_auto=6.0)
    row["bound"] = {"ms": 3.0}
    known = {
        "speed-up": 2.0,
        "regret": 0.2,
        "against all": 0.833,
        "against no handwork": 2.0,
        "share of the bound": 0.5,
    }
    assert judge(row) == known
    row["engines"]["mpsrun workers"] = {"failed": "lost"}
    assert judge(row) == known | {"regret": -0.4545, "against all": 1.833}
    row["engines"] |= {"streams in graph": cell(4.5), "compile": cell(9.0)}
    assert judge(row) == known | {"regret": -0.4545, "against all": 0.75, "against no handwork": 1.5}
    row["bound"] = {"failed": "no profiler"}
    assert "share of the bound" not in judge(row)
    assert judge(made("any", eager=12.0)) == {}


def test_a_plan_that_was_forced_as_well_is_judged_by_that_time() -> None:
    """What else the two differ by is noise."""
    row = made("any", eager=12.0, mpsrun_captured=5.0, mpsrun_workers=8.0, mpsrun_auto=6.0)
    row["engines"]["mpsrun auto"]["plans"] = ["captured streams", "captured streams"]
    assert (judge(row)["regret"], judge(row)["against all"]) == (0.0, 1.333)
    row["engines"]["mpsrun captured"] = cell(10.0)
    assert judge(row)["regret"] == 0.25
    row["engines"]["mpsrun auto"]["plans"] = ["captured streams", "serial"]
    assert judge(row)["regret"] == -0.25, "it is no lane's plan"


def test_the_summary_counts_branching_networks_at_their_smallest_batch(tmp_path: Path) -> None:
    results = Results()
    for row in (
        made("googlenet", eager=20.0, cuda_graph=8.0, streams_in_graph=3.0, mpsrun_auto=4.0),
        made("googlenet", 64, eager=20.0, cuda_graph=19.0, mpsrun_auto=19.0),
        made("towers", 4, eager=20.0, mpsrun_auto=2.5),
        made("resnet50", eager=20.0, cuda_graph=7.0, mpsrun_auto=7.0),
        made("unknown", eager=20.0, cuda_graph=7.0, mpsrun_auto=70.0),
    ):
        results.put_row(row | {"bound": {"ms": 2.0, "critical path ms": 2.0, "full GPU ms": 1.25}}, RUN)
    words = " ".join(page.page(results, "").split())
    assert "fastest of everything else in the table, handwork included: 0.10x in the worst case (unknown 8)" in words
    assert "at least 0.98x in 3 of 5 rows" in words
    assert "4.00x in the geometric mean of 2 branching networks at their smallest batch, 2.00x in the worst" in words
    assert "(measured were eager in 2, compile in 0, reduce-overhead in 0, cuda graph in 1 of them)" in words
    assert "reaches 3% (unknown 8) to 80% (towers 4) of the bound" in words
    assert "| googlenet | 8 | - | 5.00x | 0.75x | 2.00x | - | 2.00 | 2.00 | 1.25 | 50% |" in page.page(results, "")
    assert "## Memory" not in page.page(results, "")


def test_memory_is_held_against_what_eager_needs() -> None:
    row = made("any", eager=9.0, cuda_graph=9.0, mpsrun_workers=9.0, mpsrun_auto=9.0)
    cells = row["engines"]
    cells["eager"]["memory"] = {"reserved MiB": 400.0, "allocated MiB": 300.0}
    cells["cuda graph"]["memory"] = {"reserved MiB": 900.0, "allocated MiB": 300.0}
    cells["mpsrun workers"]["memory"] = cells["eager"]["memory"] | {"workers": 2, "workers MiB": 1301}
    cells["mpsrun auto"]["memory"] = cells["eager"]["memory"] | {"workers": 2, "workers MiB": None}
    assert limit_mib(cells, "mpsrun workers") == 500 + 2 * 600
    assert used_mib(cells["mpsrun workers"]) == 1701
    assert used_mib(cells["mpsrun auto"]) is None
    results = Results()
    results.put_row(row, RUN)
    needs = "| 400 | 900 | 400 + 1301 in 2 workers (limit 1700) | 400 + unknown in 2 workers |"
    assert f"| any | 8 {needs}" in page.page(results, "")
    del cells["eager"]["memory"]
    assert limit_mib(cells, "mpsrun workers") is None


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
    for table in (rows[:4], rows[4:8], rows[8:]):
        assert len({line.count(" | ") for line in table}) == 1


def test_the_chart(tmp_path: Path) -> None:
    page.write(sample(), tmp_path / "benchmarks.md")
    root = ET.parse(tmp_path / "benchmarks.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "4.00x" in texts
    assert "fast 8" in texts
    assert "absent 8" not in texts
    bars = [float(e.get("width", "0%").rstrip("%")) for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    shown = bars[1 + len(COLOURS) :]  # behind background and legend
    assert max(shown) / min(shown) == pytest.approx(4 / (10 / 12), rel=0.01)


def test_an_empty_page() -> None:
    assert "## Times" in page.page(Results(), "chart.svg")


def test_a_bound_stays_with_a_row_that_is_measured_again() -> None:
    bound = {"ms": 2.0, "critical path ms": 2.0, "full GPU ms": 1.25}
    for run, expected in (({**RUN, "commit": "def5678"}, bound), ({**RUN, "gpu": "another GPU"}, None)):
        merged, again = Results(), Results()
        merged.put_row(made("fast", eager=40.0) | {"bound": bound}, RUN)
        again.put_row(made("fast", eager=30.0, mpsrun_auto=4.0), run)
        merged.merge(again)
        (row,) = merged.rows
        assert row["engines"]["eager"]["ms"][0] == 30.0
        assert row.get("bound") == expected


def test_files_are_merged_row_by_row() -> None:
    old, new = sample(), Results()
    later = RUN | {"commit": "def5678"}
    new.put_row({"network": "fast", "batch": 8, "skipped": "timm is not installed"}, later)
    new.put_row(made("slow", eager=11.0), later)
    new.put_row(made("new", eager=1.0), RUN | {"commit": "0123456"})
    merged = Results()
    merged.merge(old)
    assert merged == old
    merged.merge(new)
    commits = {row["network"]: merged.runs[row["run"]]["commit"] for row in merged.rows}
    assert commits == {"fast": "abc1234", "slow": "def5678", "absent": "abc1234", "new": "0123456"}
    assert merged.rows[0] == old.rows[0]
    assert [*merged.rows[1]["engines"]] == ["eager"]
    assert "commit def5678: slow 8." in page.page(merged, "")


def test_a_run_that_nothing_is_left_of_is_dropped() -> None:
    results, again = Results(), Results()
    results.put_row(made("any", eager=1.0), RUN)
    again.put_row(made("any", eager=2.0), RUN | {"commit": "def5678"})
    results.merge(again)
    assert [run["commit"] for run in results.runs] == ["def5678"]
    assert results.rows == again.rows


def test_the_file_round_trips(tmp_path: Path) -> None:
    results = sample()
    results.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results
    assert Results.read(tmp_path / "none.json") == Results()
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
