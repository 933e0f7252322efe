"""What became of each network: regions, branches, where each ran, and what was refused and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mpsrun import log

if TYPE_CHECKING:
    from mpsrun.graph.regions import Region
    from mpsrun.wire.messages import Counts


@dataclass(frozen=True)
class RegionReport:
    """A region on its lanes.

    lanes: by branch, 0 for the lead or the number of a worker. first_ops: by branch, what it starts with. jobs: by
    branch, the job that it is part of, 0 in the lead.
    """

    where: str | None
    lanes: tuple[int, ...]
    first_ops: tuple[str, ...]
    jobs: tuple[int, ...]


@dataclass
class Graph:
    """One compiled graph: its regions on lanes, its refusals with their reasons, and how often it ran."""

    regions: list[RegionReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    calls: int = 0

    def note(self, reason: str) -> None:
        """Why nothing of this graph uses a lane."""
        self._refuse(reason)

    def refuse(self, reason: str, where: str | None) -> None:
        self._refuse(f"{where}: {reason}" if where else reason)

    def decline(self, region: Region, reason: str) -> None:
        self.refuse(f"a region of {len(region.branches)} branches stays in the lead: {reason}", region.where)

    def accept(self, region: Region, lanes: tuple[int, ...], jobs: tuple[int, ...]) -> None:
        first_ops = tuple(branch.nodes[0].name for branch in region.branches)
        self.regions.append(RegionReport(region.where, lanes, first_ops, jobs))

    def _refuse(self, text: str) -> None:
        if text not in self.refusals:
            self.refusals.append(text)
            log.detail(text)


graphs: list[Graph] = []


def print_table(counts: Mapping[int, Counts]) -> None:
    """Write to stderr which branch ran where, and how often its worker says that it did."""
    table = Table("region", "branch", "ran in", "forward", "backward", title="branches")
    regions = [(graph, region) for graph in graphs for region in graph.regions if graph.calls]
    for number, (graph, region) in enumerate(regions, 1):
        rows = zip(region.lanes, region.first_ops, region.jobs, strict=True)
        for branch, (lane, name, job) in enumerate(rows, 1):
            told = counts.get(lane)
            forward = told.forwards.get(job, 0) if told else graph.calls if lane == 0 else 0
            backward = str(told.backwards.get(job, 0)) if told else ""
            where = f"worker {lane}" if lane else "lead"
            table.add_row(str(number), f"{branch}: {name}", where, str(forward), backward)
    if table.row_count:
        Console(file=sys.__stderr__, stderr=True).print(table)
