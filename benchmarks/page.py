"""The figures as a page to read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chart import svg
from benchmarks.engines import ENGINES
from benchmarks.results import Results

HEAD = """# Benchmarks

Milliseconds for one training step without the optimizer: copy of the batch from pinned memory, forward, loss,
backward, `zero_grad`. Each cell has the median, the minimum and maximum of the repeats, and the speed-up over eager;
the fastest engine of a row is bold. All engines of a row took turns in one process on one GPU. `mpsrun auto` is
mpsrun's own choice; its other columns force one kind of lane. Written by `scripts/bench`.
"""


def write(results: Results, path: Path) -> None:
    """Replace the page, and the chart beside it."""
    chart = path.with_suffix(".svg")
    chart.write_text(svg(measured(results)))
    path.write_text(page(results, chart.name))


def measured(results: Results) -> list[dict[str, Any]]:
    """The rows that have figures."""
    return [row for row in results.rows if "engines" in row]


def page(results: Results, chart: str) -> str:
    """Summary, chart, times, comparisons, and what could not be measured."""
    rows = measured(results)
    lines = [HEAD, *_summary(rows), "", *_runs(results), "", f"![speed-up over eager]({chart})", ""]
    lines += ["## Times", "", *_times(rows), "", "## Choice, set-up and deviation", "", *_checks(rows)]
    missing = [*_missing(results.rows)]
    if missing:
        lines += ["", "## Not measured", "", *missing]
    if results.parts:
        lines += ["", "## Parts of a step", "", *map(_part, results.parts)]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    gains = [row for row in rows if "speed-up" in row]
    if gains:
        worst = min(gains, key=lambda row: row["speed-up"])
        mean = statistics.geometric_mean(row["speed-up"] for row in gains)
        yield f"- `mpsrun auto` against eager: {mean:.2f}x in the geometric mean of {len(gains)} rows,"
        yield f"  {worst['speed-up']:.2f}x in the worst case ({_name(worst)})."
    regrets = [row for row in rows if "regret" in row]
    if regrets:
        worst = max(regrets, key=lambda row: row["regret"])
        yield f"- `mpsrun auto` against the best of its own lanes, each forced: {worst['regret']:+.1%} of the time in"
        yield f"  the worst case ({_name(worst)})."


def _runs(results: Results) -> Iterator[str]:
    for index, run in enumerate(results.runs):
        rows = [_name(row) for row in measured(results) if row["run"] == index]
        told = ", ".join(f"{key} {value}" for key, value in run.items())
        yield f"Measured on {told}" + (f": {', '.join(rows)}." if len(results.runs) > 1 else ".")


def _times(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    engines = [engine for engine in ENGINES if any(engine in row["engines"] for row in rows)]
    yield from _head(["network", "batch", "dtype", *engines])
    for row in rows:
        cells = [_time(row["engines"], engine) for engine in engines]
        yield _line([row["network"], row["batch"], row["dtype"], *cells])


def _time(cells: dict[str, dict[str, Any]], engine: str) -> str:
    times = {name: cell["ms"] for name, cell in cells.items() if "failed" not in cell}
    if engine not in times:
        return "-"
    median, low, high = times[engine]
    text = f"{median:.2f} ({low:.2f} to {high:.2f})"
    if engine != "eager" and "eager" in times:
        text += f" {times['eager'][0] / median:.2f}x"
    return f"**{text}**" if median == min(found[0] for found in times.values()) else text


def _checks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "By engine, the seconds that its first steps took beyond later ones (compiling, starting and preparing"
    yield "workers, and under `auto` trying plans), with the number of these steps; then the deviation of all"
    yield "gradients from eager's with TF32 off, relative, in the norm. Regret is what `auto` loses against its best"
    yield "lane, forced."
    yield ""
    engines = [engine for engine in ENGINES if any(engine in row["engines"] for row in rows)]
    yield from _head(["network", "batch", "auto: speed-up", "regret", *engines])
    for row in rows:
        gain = f"{row['speed-up']:.2f}x" if "speed-up" in row else "-"
        regret = f"{row['regret']:+.1%}" if "regret" in row else "-"
        yield _line([row["network"], row["batch"], gain, regret, *(_check(row["engines"].get(e, {})) for e in engines)])


def _check(cell: dict[str, Any]) -> str:
    if "set-up" not in cell or "failed" in cell:
        return "-"
    text = f"{cell['set-up']['extra s']:.1f} s of {cell['set-up']['steps']} steps"
    return text + (f", {cell['deviation']['gradients']:.0e}" if "deviation" in cell else "")


def _missing(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "skipped" in row:
            yield f"- {_name(row)}: {row['skipped']}"
        for reason in row.get("lost", []):
            yield f"- {_name(row)}: {reason}"
        for engine, cell in row.get("engines", {}).items():
            if "failed" in cell:
                yield f"- {_name(row)}, {engine}: {cell['failed']}"


def _part(part: dict[str, Any]) -> str:
    figures = ", ".join(f"{key} {value}" for key, value in part.items() if key not in ("part", "run"))
    return f"- {part['part']}: {figures}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['network']} {row['batch']}"


def _head(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield _line(["---"] * len(columns))


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
