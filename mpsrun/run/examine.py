"""One graph looked at for an explanation: it runs once more, plainly, and its branches alone, without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpsrun.graph.effects import Effects
from mpsrun.graph.regions import Refusal, Region, Regions
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.run import names, philox
from mpsrun.run.observe import Observer
from mpsrun.run.plainrun import PlainRun
from mpsrun.run.profile import NotMeasured, Profiler, Times, measured_us
from mpsrun.run.special import Planner, describe


@dataclass(frozen=True)
class Analysis:
    """A graph and what was found in it; planner: None where there is nothing to plan."""

    gm: fx.GraphModule
    effects: Effects
    found: Regions
    kind: str
    planner: Planner | None


@dataclass(frozen=True)
class Network:
    """What a look at a graph showed, for the sizes and modes of one call."""

    name: str
    kind: str
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]
    times: Times

    @property
    def costs(self) -> Costs:
        """Measured where all branches of a region were."""
        return Costs(MACHINES.get(self.kind, MACHINES["cpu"]), measured_us(self.times))


def examine(analysis: Analysis, args: Sequence[Any]) -> Network:
    """Look at a graph that is about to be called with `args`.

    Memory that the graph writes is copied beforehand, and random generators are put back.
    """
    name = ", ".join(filter(None, (names.network(analysis.gm), describe(args))))
    found = analysis.found
    return Network(name, analysis.kind, found.regions, found.refusals, _times(analysis, args))


def _times(analysis: Analysis, args: Sequence[Any]) -> Times:
    regions, kind = analysis.found.regions, analysis.kind
    plain = PlainRun(analysis.gm, analysis.effects, kind)
    refusal = plain.refusal if kind in MACHINES else f"no lanes on the device {kind}"
    if not regions or refusal is not None:
        return {region.index: [NotMeasured(str(refusal))] * len(region.branches) for region in regions}
    copies = plain.copy(args)
    observer = Observer(analysis.gm, analysis.effects, regions)
    with torch.random.fork_rng(devices=[]), philox.undisturbed(kind):
        observer.run(*copies)
    values = dict(zip(plain.placeholders, copies, strict=True))
    profiler = Profiler(analysis.effects, observer.observation, values, kind, in_detail=True)
    return profiler.times(regions, Costs(MACHINES[kind]))
