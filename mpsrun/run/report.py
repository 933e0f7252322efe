"""What became of each network: regions, branches, where each ran, and what was refused and why."""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mpsrun import config, log
from mpsrun.plan.lanes import is_worker
from mpsrun.run import names

if TYPE_CHECKING:
    from mpsrun.graph.regions import Region
    from mpsrun.plan.plan import Assignment
    from mpsrun.wire.messages import Counts

CAPTION = "times each branch ran; the lead does not count its own backward"


@dataclass(eq=False)
class RegionReport:
    """A region on its lanes, for one set of sizes and modes.

    name: the module around it and its path, or the user's line. lanes: by branch, 0 for the lead or the number of a
    worker; shown: the same in words, with its share of the GPU. branches: by branch, the path of its module below the
    region's. jobs: by branch, the job that it is part of, 0 in the lead. calls: how often it ran on these lanes.
    """

    name: names.RegionName
    lanes: tuple[int, ...]
    shown: tuple[str, ...]
    branches: tuple[str, ...]
    jobs: tuple[int, ...]
    calls: int = 0


@dataclass
class Graph:
    """One compiled graph: its regions on lanes, its refusals with their reasons, how often it ran on lanes.

    plain: nothing of it will ever leave the lead. rests: where the load is watched, looks at it, and says whether
    nothing of it leaves the lead as things are; it goes with the graph. declined: those of the refusals that are the
    plan's. undecided, chosen: what it is called with, where its plans are still being tried, and where one was decided
    on, with its name.
    """

    plain: bool = False
    rests: Callable[[], bool] | None = None
    regions: list[RegionReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    calls: int = 0
    undecided: set[str] = field(default_factory=set)
    chosen: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str) -> None:
        """Why this graph, or a branch of it, uses no lane."""
        self._refuse(reason)

    def refuse(self, reason: str, where: str | None) -> None:
        self._refuse(f"{where}: {reason}" if where else reason)

    def decline(self, region: Region, reason: str) -> None:
        text = f"a region of {len(region.branches)} branches stays in the lead: {reason}"
        self.declined.append(f"{region.where}: {text}" if region.where else text)
        self._refuse(self.declined[-1])

    def accept(self, region: Region, choice: Assignment, jobs: tuple[int, ...]) -> RegionReport:
        """A region runs on these lanes from now on."""
        self.regions.append(
            RegionReport(names.region(region), choice.lanes, choice.names, names.branches(region), jobs)
        )
        return self.regions[-1]

    def called(self, regions: Sequence[RegionReport]) -> None:
        """The graph ran once, with these regions on their lanes."""
        self.calls += 1
        for region in regions:
            region.calls += 1

    def _refuse(self, text: str) -> None:
        if text not in self.refusals:
            self.refusals.append(text)
            log.detail(text)


graphs: list[Graph] = []


@functools.cache
def tell_at_exit() -> None:
    """Print the table when the process ends, which is the coordinator's to do where there is one."""
    if config.current().verbose:
        atexit.register(print_table, {})


def print_table(counts: Mapping[int, Counts]) -> None:
    """Write to stderr which branch ran where, and how often its worker says that it did.

    Regions of one graph that are alike (same kind of module, same branches on the same lanes) share their rows.
    """
    table = Table("region", "branch", "ran in", "forward", "backward", title="branches", caption=CAPTION)
    for graph in graphs:
        for alike in _fold([region for region in graph.regions if region.calls]):
            for row in _rows(alike, counts):
                table.add_row(*row)
            if len(alike[0].branches) > 1:
                table.add_section()
        table.add_section()
    if table.row_count:
        Console(file=sys.__stderr__, stderr=True).print(table)


def _fold(regions: Sequence[RegionReport]) -> list[list[RegionReport]]:
    groups: dict[tuple[object, ...], list[RegionReport]] = {}
    for region in regions:
        groups.setdefault((region.name.kind, region.branches, region.shown), []).append(region)
    return list(groups.values())


def _rows(alike: Sequence[RegionReport], counts: Mapping[int, Counts]) -> Iterator[tuple[str, str, str, str, str]]:
    first = alike[0]
    labels = names.fold([region.name for region in alike])
    for i, (branch, lane, shown) in enumerate(zip(first.branches, first.lanes, first.shown, strict=True)):
        label = labels[i] if i < len(labels) else ""
        jobs = [region.jobs[i] for region in alike]
        told = counts.get(lane)
        if not is_worker(lane):
            yield label, branch, shown, _times([region.calls for region in alike]), ""
        elif told is None:  # a worker that was lost takes its counts along
            yield label, branch, shown, "?", "?"
        else:
            forward = _times([told.forwards.get(job, 0) for job in jobs])
            backward = _times([told.backwards.get(job, 0) for job in jobs])
            yield label, branch, shown, forward, backward


def _times(counts: Sequence[int]) -> str:
    """The count of one region, or of several: "9 x 264" where they agree, else their sum."""
    if len(counts) == 1:
        return str(counts[0])
    if len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return f"{sum(counts)} in all"
