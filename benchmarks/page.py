"""The figures as a page to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chart import svg
from benchmarks.engines import AUTO, ENGINES, FORCED
from benchmarks.judge import judge, name, plan
from benchmarks.memory import LEAD_LIMIT, WORKER_LIMIT_MIB, limit_mib, used_mib
from benchmarks.results import Results
from benchmarks.summary import summary

HEAD = """# Benchmarks

Milliseconds for one training step without the optimizer: copy of the batch from pinned memory, forward, loss,
backward, `zero_grad`. Each cell has the median, the minimum and maximum of the repeats, and the speed-up over eager;
the fastest engine of a row is bold. All engines of a row took turns in one process on one GPU. Written by
`scripts/bench`.

`compile` and `reduce-overhead` are `torch.compile` in these modes, `cuda graph` is `make_graphed_callables`, with the
code of `torch.compile` in it as `compile in graph`, and with branches put on streams by hand (`benchmarks/by_hand.py`)
as `streams in graph`. `mpsrun auto` is mpsrun's own choice; its other columns force one kind of lane, without channels
last, which a script could also ask for by itself: then all engines would have them.
"""

BOUND = """\
The bound is what a step takes at least with the kernels of plain PyTorch, each timed alone, however its branches run:
the longer of the critical path (the longest branch of every region, and all that lies outside of regions) and of the
time with every multiprocessor full (each kernel's time, times the part of the GPU that its blocks fill). Copies,
launches, and what branches take from each other in DRAM and L2 are left out. Other kernels, as a compiler makes them or
a plan with channels last takes them, may go below it. It does not depend on mpsrun: a row that was measured again keeps
the bound that was found before on a GPU of the same kind.

Speed-ups of `auto` are those over eager, over the fastest of everything else in the table, and over the fastest of
what needs no handwork. Regret is what the plan that `auto` chose loses against the best lane, forced. Where it is the
plan of a forced lane, what the two differ by is noise: the lane's time counts for the regret, and the lane is not
among everything else.
"""

MEMORY = f"""\
MiB at most while training steps run: what torch's allocator has reserved in the lead, pools of CUDA graphs included,
without what the other engines of the row hold; then all memory of the worker processes, with their contexts, what they
share with the lead, and what other engines have left there. The lead's own context and what the driver keeps of graphs
are not counted. Below 0 is what a row gained from memory that the row before it had left.

Mpsrun may use {LEAD_LIMIT} times what eager does, and {WORKER_LIMIT_MIB} MiB for each worker: what is more has this
limit behind it. A bare CUDA context takes as much as that on an H200.
"""


def write(results: Results, path: Path) -> None:
    """Replace the page, and the chart beside it."""
    chart = path.with_suffix(".svg")
    chart.write_text(svg(measured(results)))
    path.write_text(page(results, chart.name))


def measured(results: Results) -> list[dict[str, Any]]:
    """The rows that have figures, with what these say about mpsrun's choice."""
    return [row | judge(row) for row in results.rows if "engines" in row]


def page(results: Results, chart: str) -> str:
    """Summary, chart, times, comparisons, and what could not be measured."""
    rows = measured(results)
    lines = [HEAD, *summary(rows), "", *_runs(results), "", f"![speed-up over eager]({chart})", ""]
    lines += ["## Times", "", *_times(rows), "", "## Choice and bound", "", BOUND, *_choices(rows)]
    if any("memory" in cell for row in rows for cell in row["engines"].values()):
        lines += ["", "## Memory", "", MEMORY, *_memory(rows)]
    lines += ["", "## Set-up and deviation", "", *_checks(rows)]
    missing = [*_missing(results.rows)]
    if missing:
        lines += ["", "## Not measured", "", *missing]
    if results.parts:
        lines += ["", "## Parts of a step", "", *map(_part, results.parts)]
    return "\n".join(lines) + "\n"


def _runs(results: Results) -> Iterator[str]:
    for index, run in enumerate(results.runs):
        found = [name(row) for row in measured(results) if row["run"] == index]
        found += ["parts of a step"] if any(part["run"] == index for part in results.parts) else []
        told = ", ".join(f"{key} {value}" for key, value in run.items())
        if found:
            yield f"Measured on {told}" + (f": {', '.join(found)}." if len(results.runs) > 1 else ".")


def _times(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    engines = [engine for engine in ENGINES if any(engine in row["engines"] for row in rows)]
    yield from _head(["network", "batch", "dtype", *engines])
    for row in rows:
        cells = [_time(row["engines"], engine) for engine in engines]
        yield _line([row["network"], row["batch"], row["dtype"], *cells])


def _time(cells: dict[str, dict[str, Any]], engine: str) -> str:
    times = {known: cell["ms"] for known, cell in cells.items() if "failed" not in cell}
    if engine not in times:
        return "-"
    median, low, high = times[engine]
    text = f"{median:.2f} ({low:.2f} to {high:.2f})"
    if engine != "eager" and "eager" in times:
        text += f" {times['eager'][0] / median:.2f}x"
    return f"**{text}**" if median == min(found[0] for found in times.values()) else text


def _choices(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    ratios = {"over eager": "speed-up", "over all": "against all", "over no handwork": "against no handwork"}
    times = {"bound ms": "ms", "critical path ms": "critical path ms", "full GPU ms": "full GPU ms"}
    yield from _head(["network", "batch", "auto's plan", *ratios, "regret", *times, "reached by auto"])
    for row in rows:
        found = [f"{row[key]:.2f}x" if key in row else "-" for key in ratios.values()]
        found.append(f"{row['regret']:+.1%}" if "regret" in row else "-")
        limit = row.get("bound", {})
        found += [f"{limit[key]:.2f}" if key in limit else "-" for key in times.values()]
        found.append(f"{row['share of the bound']:.0%}" if "share of the bound" in row else "-")
        yield _line([row["network"], row["batch"], plan(row) or "-", *found])


def _memory(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    engines = [engine for engine in ENGINES if any("memory" in row["engines"].get(engine, {}) for row in rows)]
    yield from _head(["network", "batch", *engines])
    for row in rows:
        yield _line([row["network"], row["batch"], *(_need(row["engines"], engine) for engine in engines)])


def _need(cells: dict[str, dict[str, Any]], engine: str) -> str:
    memory = cells.get(engine, {}).get("memory")
    if memory is None:
        return "-"
    text = f"{memory['reserved MiB']:.0f}"
    if "workers" in memory:
        told = memory["workers MiB"]
        text += f" + {'unknown' if told is None else f'{told:.0f}'} in {memory['workers']} workers"
    used, limit = used_mib(cells[engine]), limit_mib(cells, engine)
    is_over = used is not None and limit is not None and used > limit
    return f"{text} (limit {limit:.0f})" if is_over and engine in (*FORCED, AUTO) else text


def _checks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "By engine, the seconds that its first steps took beyond later ones (compiling, starting and preparing"
    yield "workers, and under `auto` trying plans), with the number of these steps; then the deviation of all"
    yield "gradients from eager's with TF32 off, relative, in the norm."
    yield ""
    engines = [engine for engine in ENGINES if any(engine in row["engines"] for row in rows)]
    yield from _head(["network", "batch", *engines])
    for row in rows:
        yield _line([row["network"], row["batch"], *(_check(row["engines"].get(engine, {})) for engine in engines)])


def _check(cell: dict[str, Any]) -> str:
    if "set-up" not in cell or "failed" in cell:
        return "-"
    text = f"{cell['set-up']['extra s']:.1f} s of {cell['set-up']['steps']} steps"
    return text + (f", {cell['deviation']['gradients']:.0e}" if "gradients" in cell.get("deviation", {}) else "")


def _missing(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "skipped" in row:
            yield f"- {name(row)}: {row['skipped']}"
        for reason in row.get("lost", []):
            yield f"- {name(row)}: {reason}"
        if "failed" in row.get("bound", {}):
            yield f"- {name(row)}, bound: {row['bound']['failed']}"
        for engine, cell in row.get("engines", {}).items():
            if "failed" in cell:
                yield f"- {name(row)}, {engine}: {cell['failed']}"
            if "failed" in cell.get("deviation", {}):
                yield f"- {name(row)}, {engine}, deviation: {cell['deviation']['failed']}"


def _part(part: dict[str, Any]) -> str:
    figures = ", ".join(f"{key} {value}" for key, value in part.items() if key not in ("part", "run"))
    return f"- {part['part']}: {figures}"


def _head(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield _line(["---"] * len(columns))


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
