"""The first lines of the page: mpsrun's choice against what it is compared with, over all rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cases import NETWORKS
from benchmarks.engines import NO_HANDWORK
from benchmarks.judge import medians_ms, name

CLOSE = 0.98  # as fast, within what is noise
Rows = Sequence[dict[str, Any]]


def summary(rows: Rows) -> Iterator[str]:
    """Each line stands only where rows have what it tells of."""
    yield from _against_eager([row for row in rows if "speed-up" in row])
    yield from _against_own_lanes([row for row in rows if "regret" in row])
    yield from _against_all([row for row in rows if "against all" in row])
    yield from _against_no_handwork([row for row in rows if "against no handwork" in row and _is_small(row)])
    yield from _bound([row for row in rows if "share of the bound" in row])


def _against_eager(rows: Rows) -> Iterator[str]:
    if rows:
        yield f"- `mpsrun auto` against eager: {_mean(rows, 'speed-up')} of {len(rows)} rows,"
        yield f"  {_worst(rows, 'speed-up')}."


def _against_own_lanes(rows: Rows) -> Iterator[str]:
    if rows:
        worst = max(rows, key=lambda row: row["regret"])
        yield f"- `mpsrun auto` against the best of its own lanes, each forced: {worst['regret']:+.1%} of the time in"
        yield f"  the worst case ({name(worst)})."


def _against_all(rows: Rows) -> Iterator[str]:
    if rows:
        close = sum(row["against all"] >= CLOSE for row in rows)
        yield "- `mpsrun auto` against the fastest of everything else in the table, handwork included:"
        yield f"  {_worst(rows, 'against all')}, at least {CLOSE:.2f}x in {close} of {len(rows)} rows."


def _against_no_handwork(rows: Rows) -> Iterator[str]:
    if rows:
        measured = [f"{engine} in {sum(engine in medians_ms(row) for row in rows)}" for engine in NO_HANDWORK]
        yield f"- `mpsrun auto` against the fastest of what needs no handwork: {_mean(rows, 'against no handwork')}"
        yield f"  of {len(rows)} branching networks at their smallest batch, {_worst(rows, 'against no handwork')}"
        yield f"  (measured were {', '.join(measured)} of them)."


def _bound(rows: Rows) -> Iterator[str]:
    if rows:
        best, worst = (pick(rows, key=lambda row: row["share of the bound"]) for pick in (max, min))
        yield f"- `mpsrun auto` reaches {worst['share of the bound']:.0%} ({name(worst)}) to"
        yield f"  {best['share of the bound']:.0%} ({name(best)}) of the bound."


def _mean(rows: Rows, ratio: str) -> str:
    return f"{statistics.geometric_mean(row[ratio] for row in rows):.2f}x in the geometric mean"


def _worst(rows: Rows, ratio: str) -> str:
    worst = min(rows, key=lambda row: row[ratio])
    return f"{worst[ratio]:.2f}x in the worst case ({name(worst)})"


def _is_small(row: dict[str, Any]) -> bool:
    """Whether this is a branching network at its smallest batch."""
    network = NETWORKS.get(row["network"])
    return network is not None and not network.chain and row["batch"] == min(network.batches)
