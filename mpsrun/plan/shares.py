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
# A kernel that would keep the whole GPU busy for so long fills it, whatever runs beside it.
FILLING_US = 10.0
# Branches are alike enough if none has more than so many times the mean.
ALIKE = 3.0
EVERYWHERE = (0, WHOLE)  # the place of a lane that has the whole GPU

# By lane with a share, where that starts and how large it is, in percent of the GPU.
Places = Mapping[int, tuple[int, int]]


def worth_a_try(region: Region, lanes: Sequence[int], costs: Costs) -> bool:
    """Whether lanes with shares may be faster than lanes that take what they get.

    Shares keep the kernels of one branch from crowding out those of another. That needs branches that last about as
    long, since a short one leaves its share idle, and kernels that do not fill the whole GPU by themselves.
    """
    load_us: dict[int, float] = {}
    for lane, us in zip(lanes, costs.branch_us(region), strict=True):
        load_us[lane] = load_us.get(lane, 0.0) + us
    kernels = sum(branch.kernels for branch in region.branches)
    work_us = sum(costs.busy_us(region)) / FORWARD_AND_BACKWARD
    if len(load_us) < 2 or not kernels:
        return False
    return max(load_us.values()) <= ALIKE * sum(load_us.values()) / len(load_us) and work_us / kernels < FILLING_US


def by_cost(region: Region, lanes: Sequence[int], costs: Costs) -> tuple[int, ...]:
    """By branch, the share of its lane: in proportion to what the lane has to do, all together no more than the whole.

    lanes: by branch. What the lead has to do keeps its part free.
    """
    load_us: dict[int, float] = {}
    for lane, us in zip(lanes, costs.branch_us(region), strict=True):
        load_us[lane] = load_us.get(lane, 0.0) + us
    left, total_us = WHOLE - LEAST * len(load_us), sum(load_us.values()) or 1.0
    share = {lane: LEAST + int(left * us / total_us) for lane, us in load_us.items()}
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
