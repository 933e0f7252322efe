"""Which branch of which region runs on which lane."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpsrun.errors import UsageError
from mpsrun.graph.regions import Region
from mpsrun.plan.cost import Machine, branch_us, crossing_us

LEAD = 0
# A region pays when it saves this much of its own time, and no less than this many microseconds.
MIN_GAIN = 0.05
MIN_GAIN_US = 50.0


@dataclass(frozen=True)
class Assignment:
    """One lane a branch: 0 is the lead, i >= 1 is worker i."""

    lanes: tuple[int, ...]


@dataclass(frozen=True)
class Declined:
    """The region runs in the lead, and why."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """What each region does, by region index; `str(plan)` is text that `Plan.parse` reads back."""

    regions: Mapping[int, Assignment | Declined] = field(default_factory=dict)

    def __str__(self) -> str:
        return "".join(f"{_line(index, choice)}\n" for index, choice in sorted(self.regions.items()))

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan from its own text; raises `UsageError` with the line that is none of a plan's."""
        found: dict[int, Assignment | Declined] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                index, choice = _parse_line(line.strip(), number)
                if index in found:
                    raise UsageError(f"plan, line {number}: region {index} stands in an earlier line too; keep one")
                found[index] = choice
        return cls(found)


_LINE = re.compile(
    r"region (?P<index>\d+): (?:(?P<lanes>(?:lead|worker [1-9]\d*)(?: \| .+)?)|declined, (?P<reason>.+))"
)
_LANE = re.compile(r"lead|worker (?P<worker>[1-9]\d*)")


def plan_region(
    region: Region,
    worker_ids: Sequence[int],
    machine: Machine,
    forced: bool,
    nesting: Collection[int] = (),
) -> Assignment | Declined:
    """Assign the branches of `region` by longest processing time, or decline where it would not pay.

    `worker_ids` are lanes (1 and up), `nesting` the branches with regions of their own inside. Pinned branches stay in
    the lead; where nothing is pinned the lead keeps the shortest branch, and takes a share of the rest. `forced` skips
    the question whether it pays.
    """
    if not worker_ids:
        return Declined("there is no worker")
    if not any(branch.pinned is None for branch in region.branches):
        return Declined(f"no branch can leave the lead: {region.branches[0].pinned}")
    lanes = longest_first(region, worker_ids, machine, nesting)
    if not forced:
        reason = not_worth_it(region, lanes, machine)
        if reason is not None:
            return Declined(reason)
    return Assignment(lanes)


def longest_first(
    region: Region, worker_ids: Iterable[int], machine: Machine, nesting: Collection[int] = ()
) -> tuple[int, ...]:
    """Each branch, the longest first, to the lane that is free first (Graham 1969)."""
    costs_us = [branch_us(branch, machine) for branch in region.branches]
    load_us = dict.fromkeys([*worker_ids, LEAD], 0.0)  # on a tie a worker goes before the lead
    lanes = [LEAD] * len(costs_us)
    free = [index for index, branch in enumerate(region.branches) if branch.pinned is None]
    stay = [index for index, branch in enumerate(region.branches) if branch.pinned is not None]
    if not stay and len(free) > 1:
        # The lead has time for one: the shortest, since it pays for the crossing, too. But the rest of the network, as
        # it stands beside an early head, must not leave: the regions inside it would be lost.
        rest = [index for index in nesting if costs_us[index] > sum(costs_us) / 2]
        stay = rest or [min(free, key=lambda index: costs_us[index])]
        free.remove(stay[0])
    load_us[LEAD] = machine.crossing_us + sum(costs_us[index] for index in stay)
    for index in sorted(free, key=lambda index: -costs_us[index]):
        lanes[index] = min(load_us, key=lambda lane: load_us[lane])
        load_us[lanes[index]] += costs_us[index]
    if all(lane == LEAD for lane in lanes):  # pinned branches are nothing beside the rest
        lanes[free[0]] = next(iter(load_us))
    return tuple(lanes)


def makespan_us(region: Region, lanes: Sequence[int], machine: Machine) -> float:
    """Microseconds until the last lane is done, without crossings."""
    load_us: dict[int, float] = {}
    for branch, lane in zip(region.branches, lanes, strict=True):
        load_us[lane] = load_us.get(lane, 0.0) + branch_us(branch, machine)
    return max(load_us.values())


def not_worth_it(region: Region, lanes: Sequence[int], machine: Machine) -> str | None:
    """Why running `region` on these lanes would not pay, or None where it would."""
    if machine.cores_shared:
        return "one op already uses every core of this machine"
    serial_us = makespan_us(region, [LEAD] * len(lanes), machine)
    crossings = [branch for branch, lane in zip(region.branches, lanes, strict=True) if lane != LEAD]
    gain_us = serial_us - makespan_us(region, lanes, machine) - crossing_us(crossings, machine)
    needed_us = max(MIN_GAIN_US, MIN_GAIN * serial_us)
    if gain_us < needed_us:
        return f"too small: of {serial_us:.0f} us it would save {gain_us:.0f} us, {needed_us:.0f} us are needed"
    return None


def _line(index: int, choice: Assignment | Declined) -> str:
    if isinstance(choice, Declined):
        return f"region {index}: declined, {choice.reason}"
    lanes = ("lead" if lane == LEAD else f"worker {lane}" for lane in choice.lanes)
    return f"region {index}: {' | '.join(lanes)}"


def _parse_line(line: str, number: int) -> tuple[int, Assignment | Declined]:
    found = _LINE.fullmatch(line)
    if found is not None and found["reason"] is not None:
        return int(found["index"]), Declined(found["reason"])
    names = [_LANE.fullmatch(name) for name in found["lanes"].split(" | ")] if found is not None else [None]
    lanes = [int(name["worker"] or LEAD) for name in names if name is not None]
    if found is None or len(lanes) != len(names):
        raise UsageError(
            f"plan, line {number}: expected 'region 0: lead | worker 1' or 'region 0: declined, reason', found {line!r}"
        )
    return int(found["index"]), Assignment(tuple(lanes))
