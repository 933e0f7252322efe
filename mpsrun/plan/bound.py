"""How much faster the regions of a graph could be at best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpsrun.graph.regions import Region
from mpsrun.plan.cost import Costs


@dataclass(frozen=True)
class Bound:
    """Microseconds of all regions, forward and backward: one branch after the other, and along the critical path.

    longest: by region index, the branch that the path takes.
    """

    serial_us: float
    critical_us: float
    longest: Mapping[int, int] = field(default_factory=dict, compare=False)

    @property
    def speed_up(self) -> float:
        """Of the regions alone, were crossings free and the device never full."""
        return self.serial_us / self.critical_us if self.critical_us else 1.0

    def step_speed_up(self, step_us: float) -> float:
        """Of a whole training step that takes `step_us` now (Amdahl 1967)."""
        rest_us = max(0.0, step_us - self.serial_us)
        return (rest_us + self.serial_us) / (rest_us + self.critical_us) if rest_us + self.critical_us else 1.0


def bound(regions: Sequence[Region], costs: Costs) -> Bound:
    """The upper bound of the speed-up; `regions` are all of a graph, parents before children."""
    shorter_us: dict[tuple[int, int], float] = {}
    longest: dict[int, int] = {}
    serial_us = critical_us = 0.0
    for region in reversed(regions):
        alone_us = costs.branch_us(region)
        shortened = [us - shorter_us.get((region.index, branch), 0.0) for branch, us in enumerate(alone_us)]
        longest[region.index] = shortened.index(max(shortened))
        longest_us = max(0.0, *shortened)
        if region.parent is None:
            serial_us += sum(alone_us)
            critical_us += longest_us
        else:
            shorter_us[region.parent] = shorter_us.get(region.parent, 0.0) + sum(alone_us) - longest_us
    return Bound(serial_us, critical_us, longest)
