"""What the figures of one row say about mpsrun's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engines import AUTO, FORCED, NO_HANDWORK

# Plans of `auto` by their names, and the engines that force just these.
SAME = {
    "serial": "eager",
    "streams": "mpsrun streams",
    "captured streams": "mpsrun captured",
    "captured workers": "mpsrun captured-workers",
}


def plan(row: Mapping[str, Any]) -> str:
    """What `auto` chose, for all graphs of the network; empty where that is not known."""
    return ", ".join(dict.fromkeys(row["engines"].get(AUTO, {}).get("plans", ())))


def name(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    return f"{row['network']} {row['batch']}"


def medians_ms(row: Mapping[str, Any]) -> dict[str, float]:
    """Of a step, by engine; those that failed are left out."""
    return {name: cell["ms"][0] for name, cell in row["engines"].items() if "ms" in cell and "failed" not in cell}


def judge(row: Mapping[str, Any]) -> dict[str, float]:
    """Ratios that are the better the larger they are, and the regret.

    speed-up: how often `auto` steps while eager steps once. against all, against no handwork: the same for the fastest
    of all other engines, and of those that need no work by hand. share of the bound: the bound over what `auto` takes.
    regret: what `auto` loses against the best of its own lanes, forced. Where its plan is that of a forced lane, both
    are the same thing measured twice: the lane's time counts for the regret, and the lane is none of the others.
    """
    medians = medians_ms(row)
    if AUTO not in medians:
        return {}
    auto_ms = medians.pop(AUTO)
    found = {}
    if "eager" in medians:
        found["speed-up"] = round(medians["eager"] / auto_ms, 3)
    if forced := _of(medians, FORCED):
        own_ms = medians.get(SAME.get(plan(row), ""), auto_ms)
        found["regret"] = round(own_ms / min(forced) - 1, 4)
    if others := [ms for engine, ms in medians.items() if engine not in FORCED or engine != SAME.get(plan(row))]:
        found["against all"] = round(min(others) / auto_ms, 3)
    if usual := _of(medians, NO_HANDWORK):
        found["against no handwork"] = round(min(usual) / auto_ms, 3)
    if "ms" in row.get("bound", {}):
        found["share of the bound"] = round(row["bound"]["ms"] / auto_ms, 3)
    return found


def _of(medians: Mapping[str, float], engines: Sequence[str]) -> list[float]:
    return [medians[engine] for engine in engines if engine in medians]
