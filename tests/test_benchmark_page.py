"""The benchmark's figures on disk, as a page and as a chart, from a made-up sample."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import matrix, page
from benchmarks.chart import COLOURS
from benchmarks.results import Results

RUN = {"gpu": "a GPU", "torch": "2.13.0", "commit": "abc1234"}


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
    shown = bars[1 + len(COLOURS) :]  # behind background and legend
    assert max(shown) / min(shown) == pytest.approx(4 / (10 / 12), rel=0.01)


def test_an_empty_page() -> None:
    assert "## Times" in page.page(Results(), "chart.svg")


def test_the_file_round_trips(tmp_path: Path) -> None:
    results = sample()
    results.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results
    assert Results.read(tmp_path / "none.json") == Results()
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
