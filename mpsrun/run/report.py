"""What became of each network: regions, branches, where each ran, and what was refused and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpsrun import log

if TYPE_CHECKING:
    from mpsrun.graph.regions import Region
    from mpsrun.run.crossing import Crossing


@dataclass(frozen=True)
class RegionReport:
    """A region that runs on several lanes: one lane a branch (0 is the lead), and the job of each worker."""

    where: str | None
    lanes: tuple[int, ...]
    jobs: dict[int, int]


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

    def accept(self, region: Region, lanes: tuple[int, ...], crossing: Crossing) -> None:
        jobs = {share.link.index: share.job for share in crossing.shares}
        self.regions.append(RegionReport(region.where, lanes, jobs))

    def _refuse(self, text: str) -> None:
        if text not in self.refusals:
            self.refusals.append(text)
            log.detail(text)


graphs: list[Graph] = []
