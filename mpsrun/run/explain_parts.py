"""From what was found in a network, measured and decided to the parts of an explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpsrun.graph.regions import Region
from mpsrun.plan import bound as bounds
from mpsrun.plan.candidates import SERIAL, Candidate, nesting_of, predicted_us
from mpsrun.plan.cost import Costs
from mpsrun.plan.lanes import LEAD, lane_name
from mpsrun.plan.plan import Assignment, Declined, Plan, decide
from mpsrun.run import names
from mpsrun.run.examine import Network
from mpsrun.run.explanation import (
    Bound,
    BranchPart,
    CandidatePart,
    Explanation,
    NetworkPart,
    PlanPart,
    Refused,
    RegionPart,
    RegionPlan,
)
from mpsrun.run.profile import Alone


@dataclass(frozen=True)
class Chosen:
    """The plan of a network among its candidates; medians_us: by name, of the steps that were timed under each."""

    source: str
    candidates: tuple[Candidate, ...]
    index: int
    medians_us: Mapping[str, float]

    @property
    def plan(self) -> Plan:
        return self.candidates[self.index].plan


def explained(number: int, network: Network, chosen: Chosen | None, more_refused: Sequence[str]) -> Explanation:
    """All that is known of the network with this number."""
    found = bounds.bound(network.regions, network.costs)
    refused = [Refused(network=number, reason=r.reason, where=r.where) for r in network.refusals]
    refused += [Refused(network=number, reason=text, where=None) for text in more_refused]
    step_us = chosen.medians_us.get(SERIAL) if chosen is not None else None
    return Explanation(
        networks=(NetworkPart(name=network.name, bound=_bound(found, step_us)),),
        regions=tuple(_regions(number, network, chosen, found)),
        bound=_bound(found, step_us),
        plan=(_plan(number, network, chosen),) if chosen is not None else (),
        refused=tuple(refused),
    )


def together(parts: Sequence[Explanation]) -> Explanation:
    """Several networks as one explanation."""
    serial_us = sum(part.bound.serial_us for part in parts)
    critical_us = sum(part.bound.critical_us for part in parts)
    found = _bound(bounds.Bound(serial_us, critical_us), None)
    return Explanation(
        networks=tuple(network for part in parts for network in part.networks),
        regions=tuple(region for part in parts for region in part.regions),
        bound=parts[0].bound if len(parts) == 1 else found,
        plan=tuple(plan for part in parts for plan in part.plan),
        refused=tuple(refused for part in parts for refused in part.refused),
    )


def _regions(number: int, network: Network, chosen: Chosen | None, whole: bounds.Bound) -> Iterator[RegionPart]:
    costs = network.costs
    for region in network.regions:
        plan = _region_plan(region, network, chosen)
        name = names.region(region)
        yield RegionPart(
            network=number,
            index=region.index,
            name=name.path,
            kind=name.kind,
            where=region.where,
            parent=region.parent,
            measured=region.index in costs.measured_us,
            bound=_bound(bounds.bound(_inside(region, network.regions), costs), None),
            plan=plan,
            branches=tuple(_branches(region, network, plan, whole.longest[region.index])),
        )


def _branches(region: Region, network: Network, plan: RegionPlan, longest: int) -> Iterator[BranchPart]:
    times_us = network.costs.branch_us(region)
    for i, (branch, name) in enumerate(zip(region.branches, names.branches(region), strict=True)):
        alone = network.times[region.index][i]
        measured = alone if isinstance(alone, Alone) else None
        yield BranchPart(
            name=name,
            lane=plan.lanes[i],
            time_us=times_us[i],
            forward_us=measured.forward_us if measured else None,
            backward_us=measured.backward_us if measured else None,
            not_measured=None if isinstance(alone, Alone) else alone.reason,
            pinned=branch.pinned,
            critical=i == longest,
            bytes_in=branch.bytes_in,
            bytes_out=branch.bytes_out,
            kernels=branch.kernels,
            flops=branch.flops,
            peak_bytes=measured.peak_bytes if measured else None,
            sm_demand=measured.demand.share if measured and measured.demand else None,
        )


def _region_plan(region: Region, network: Network, chosen: Chosen | None) -> RegionPlan:
    lead = (lane_name(LEAD),) * len(region.branches)
    if chosen is None:
        return RegionPlan(lanes=lead, declined=f"no lanes on the device {network.kind}")
    choice = chosen.plan.regions[region.index]
    if isinstance(choice, Assignment):
        return RegionPlan(lanes=choice.names, declined=None)
    return RegionPlan(lanes=lead, declined=_why_declined(region, choice, network, chosen))


def _why_declined(region: Region, choice: Declined, network: Network, chosen: Chosen) -> str:
    """The serial plan declines everything, which is no reason."""
    if choice.reason != SERIAL:
        return choice.reason
    if chosen.source in ("tuned", "cached"):
        return "training steps were the fastest with everything in the lead"
    workers = sorted(frozenset().union(*(candidate.plan.workers for candidate in chosen.candidates))) or [1]
    nesting = nesting_of(network.regions)[region.index]
    found = decide(region, workers, network.costs, False, nesting)
    return found.reason if isinstance(found, Declined) else "with everything in the lead the regions should be fastest"


def _plan(number: int, network: Network, chosen: Chosen) -> PlanPart:
    parts = [_candidate(candidate, network.regions, network.costs, chosen) for candidate in chosen.candidates]
    part = parts[chosen.index]
    return PlanPart(
        network=number,
        name=part.name,
        source=chosen.source,
        text=str(chosen.plan),
        predicted_us=part.predicted_us,
        predicted_step_us=part.predicted_step_us,
        measured_step_us=part.measured_step_us,
        candidates=tuple(parts),
    )


def _candidate(candidate: Candidate, regions: Sequence[Region], costs: Costs, chosen: Chosen) -> CandidatePart:
    """What was predicted from the times alone; of a step, from the plain one and what the regions should save."""
    regions_us = predicted_us(candidate.plan, regions, costs)
    step_us = chosen.medians_us.get(SERIAL)
    serial_us = sum(costs.serial_us(region) for region in regions if region.parent is None)
    return CandidatePart(
        name=candidate.name,
        predicted_us=regions_us,
        predicted_step_us=None if step_us is None else max(0.0, step_us - serial_us + regions_us),
        measured_step_us=chosen.medians_us.get(candidate.name),
    )


def _inside(region: Region, regions: Sequence[Region]) -> list[Region]:
    """A region as if it were outermost, and all regions inside it."""
    inside = {region.index}
    found = [dataclasses.replace(region, parent=None)]
    for other in regions:  # parents come before children
        if other.parent is not None and other.parent[0] in inside:
            inside.add(other.index)
            found.append(other)
    return found


def _bound(found: bounds.Bound, step_us: float | None) -> Bound:
    return Bound(
        serial_us=found.serial_us,
        critical_us=found.critical_us,
        speed_up=found.speed_up,
        step_speed_up=None if step_us is None else found.step_speed_up(step_us),
    )
