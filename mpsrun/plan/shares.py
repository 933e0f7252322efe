"""Shares of a GPU's multiprocessors, in percent: how large a part each lane of a region has, and which one.

The lead's own stream always has the whole GPU.
"""

from collections.abc import Mapping, Sequence

from mpsrun.graph.regions import Region
from mpsrun.plan.cost import FORWARD_AND_BACKWARD, Costs
from mpsrun.plan.lanes import LEAD, WHOLE
from mpsrun.plan.plan import Assignment

# Less cannot be cut off: 8 of the 132 multiprocessors of an H100.
LEAST = 7
# All shares together, as a multiple of the GPU. Shares that do not overlap idle wherever a branch has little to do: on
# an H100 they made every network slower, and three times as much made those of branches that are alike faster.
OVERLAP = 3
# Branches are alike if the longest takes no more than so many times the shortest.
ALIKE = 1.5
# A kernel that would keep the whole GPU busy for so long fills it, whatever runs beside it.
FILLING_US = 20.0
EVERYWHERE = (0, WHOLE)  # the place of a lane that has the whole GPU

# By lane with a share, where that starts and how large it is, in percent of the GPU.
Places = Mapping[int, tuple[int, int]]


def worth_a_try(region: Region, lanes: Sequence[int], costs: Costs) -> bool:
    """Whether lanes with shares may be faster than lanes that take what they get.

    Shares keep the kernels of one branch from crowding out those of the others. That needs branches that are alike,
    since a short one leaves its share idle, and kernels that do not fill the whole GPU by themselves.
    """
    times_us = costs.branch_us(region)
    kernels = sum(branch.kernels for branch in region.branches)
    if len({*lanes}) <= OVERLAP or not kernels:
        return False
    work_us = sum(costs.busy_us(region)) / FORWARD_AND_BACKWARD
    return max(times_us) <= ALIKE * min(times_us) and work_us / kernels < FILLING_US


def by_cost(region: Region, lanes: Sequence[int], costs: Costs) -> tuple[int, ...]:
    """By branch, the share of its lane, in proportion to what the lane has to do; the lead's is the whole."""
    load_us: dict[int, float] = {}
    for lane, us in zip(lanes, costs.branch_us(region), strict=True):
        load_us[lane] = load_us.get(lane, 0.0) + us
    total_us = sum(load_us.values()) or 1.0
    share = {lane: min(WHOLE, max(LEAST, int(OVERLAP * WHOLE * us / total_us))) for lane, us in load_us.items()}
    return tuple(WHOLE if lane == LEAD else share[lane] for lane in lanes)


def places_of(assignment: Assignment) -> Places:
    """Where the shares are, one behind the other in a ring: they overlap only if together they exceed the whole."""
    found: dict[int, tuple[int, int]] = {}
    start = 0
    for lane, share in zip(assignment.lanes, assignment.shares, strict=False):
        if share != WHOLE and lane not in found:
            found[lane] = start, share
            start = (start + share) % WHOLE
    return found
