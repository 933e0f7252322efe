"""Branches to lanes by longest processing time, and how long a region then takes."""

import itertools
from collections.abc import Collection, Mapping, Sequence

from mpsrun.graph.regions import Region
from mpsrun.plan.cost import Costs, crossing_us
from mpsrun.plan.lanes import LEAD, is_stream, is_worker

# A region pays when it saves this much of its own time, and no less than this many microseconds.
MIN_GAIN = 0.05
MIN_GAIN_US = 50.0
# An estimate may be wrong by a factor of two; beyond that no trial is worth its steps.
ESTIMATE_ERROR = 2.0


def longest_first(duration_us: Mapping[int, float], load_us: Mapping[int, float]) -> dict[int, int]:
    """Each piece, the longest first, to the lane that is free first; on a tie to the lane that stands first.

    duration_us: by piece. load_us: by lane, when it is free. Where all lanes are free at once the result is at most
    4/3 - 1/(3m) times the shortest possible (Graham 1969), otherwise 3/2 - 1/(2m) times (Lee 1991).
    """
    load = dict(load_us)
    lanes = {}
    for piece in sorted(duration_us, key=lambda piece: -duration_us[piece]):
        lanes[piece] = min(load, key=lambda lane: load[lane])
        load[lanes[piece]] += duration_us[piece]
    return lanes


def spread(
    region: Region, lanes: Sequence[int], costs: Costs, nesting: Collection[int] = (), lead_share: bool = True
) -> tuple[int, ...]:
    """A lane for each branch: workers or side streams from `lanes`, and the lead.

    Pinned branches stay in the lead. Where none is pinned the lead keeps the shortest, and takes a share of the rest.
    Without `lead_share`, or where there are workers enough, it keeps nothing that can leave. `nesting`: the branches
    with regions of their own inside.
    """
    duration_us = costs.branch_us(region)
    free = [index for index, branch in enumerate(region.branches) if branch.pinned is None]
    stay = [index for index, branch in enumerate(region.branches) if branch.pinned is not None]
    if not stay and len(free) > 1:
        launch_us = costs.launch_us(region)
        shares = lead_share and not _is_relieved([launch_us[index] for index in free], lanes, costs, nesting)
        stay = _kept(duration_us, free, nesting, shares)
    going = {index: duration_us[index] for index in free if index not in stay}
    load_us = dict.fromkeys(lanes, 0.0)
    if lead_share:  # on a tie another lane goes before the lead
        handing_over_us = costs.machine.crossing_us if any(map(is_worker, lanes)) else 0.0
        load_us[LEAD] = handing_over_us + sum(duration_us[index] for index in stay)
    found = longest_first(going, load_us)
    if all(lane == LEAD for lane in found.values()):  # pinned branches are nothing beside the rest
        found[next(iter(going))] = lanes[0]
    return tuple(found.get(index, LEAD) for index in range(len(duration_us)))


def _is_relieved(launch_us: Sequence[float], lanes: Sequence[int], costs: Costs, nesting: Collection[int]) -> bool:
    """Whether there is a worker for every branch, and to hand over the shortest takes less than to launch it.

    The lead has more to do than its branches: all that is outside of regions, and the gradients of all parameters. But
    a branch with regions inside, which workers may share, is better kept.
    """
    if nesting or costs.replayed or not all(map(is_worker, lanes)) or len(lanes) < len(launch_us):
        return False
    return min(launch_us) > costs.machine.crossing_us


def _kept(duration_us: Sequence[float], free: Sequence[int], nesting: Collection[int], lead_share: bool) -> list[int]:
    """What the lead keeps where it could hand over everything.

    It has time for one: the shortest, since it pays for the crossing, too. But the rest of the network, as it stands
    beside an early head, must not leave: the regions inside it would be lost.
    """
    rest = [index for index in nesting if duration_us[index] > sum(duration_us) / 2]
    if rest or not lead_share:
        return rest
    return [min(free, key=lambda index: duration_us[index])]


def region_us(
    region: Region,
    lanes: Sequence[int],
    costs: Costs,
    saved_us: Mapping[int, float] | None = None,
    shares: Sequence[int] = (),
) -> float:
    """Microseconds of a region on these lanes; `saved_us`: by branch, what the regions inside it save.

    That is the longest lane, or all that the lead's thread launches, or all that keeps the whole device busy; handing
    over comes on top. `shares`: by branch, the part of the device (percent) on which its work takes longer.
    """
    saved = saved_us or {}
    duration_us = [max(0.0, us - saved.get(index, 0.0)) for index, us in enumerate(costs.branch_us(region))]
    work_us = (100 / share * us for share, us in zip(shares, costs.busy_us(region), strict=False))
    duration_us = [max(us, work) for us, work in itertools.zip_longest(duration_us, work_us, fillvalue=0.0)]
    if all(lane == LEAD for lane in lanes):
        return sum(duration_us)
    load_us: dict[int, float] = {}
    for lane, us in zip(lanes, duration_us, strict=True):
        load_us[lane] = load_us.get(lane, 0.0) + us
    launches_us = map(min, costs.launch_us(region), duration_us)  # inner regions may launch elsewhere
    launched_us = sum(us for us, lane in zip(launches_us, lanes, strict=True) if not is_worker(lane))
    crossing = [branch for branch, lane in zip(region.branches, lanes, strict=True) if is_worker(lane)]
    handing_over_us = crossing_us(crossing, costs.machine) + costs.stream_us * sum(map(is_stream, load_us))
    return max(*load_us.values(), launched_us, sum(costs.busy_us(region))) + handing_over_us


def not_worth_it(region: Region, lanes: Sequence[int], costs: Costs) -> str | None:
    """Why running `region` on these lanes would not pay, or None where it would."""
    if costs.machine.cores_shared:
        return "one op already uses every core of this machine"
    serial_us = costs.serial_us(region)
    gain_us = serial_us - region_us(region, lanes, costs)
    needed_us = max(MIN_GAIN_US, MIN_GAIN * serial_us)
    if gain_us < needed_us:
        return f"too small: of {serial_us:.0f} us it would save {gain_us:.0f} us, {needed_us:.0f} us are needed"
    return None


def hopeless(region: Region, costs: Costs) -> str | None:
    """Why no number of workers can make `region` pay, even where the estimate is off by a factor of two."""
    if costs.machine.cores_shared:
        return "one op already uses every core of this machine"
    duration_us = costs.branch_us(region)
    most_us = sum(duration_us) - max(duration_us)
    if most_us * ESTIMATE_ERROR <= costs.machine.crossing_us:
        return f"too small: at most {most_us:.0f} us to save, a crossing costs {costs.machine.crossing_us:.0f} us"
    return None
