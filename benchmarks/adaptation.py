"""What a trace shows of a training beside another process that came and went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mpsrun.monitor.trace import Decided, Line, Stepped

CHANGED_S = 10.0  # within which a plan has to be changed once a tenant has come
BACK_S = 20.0
MOST_CHANGES = 2
SETTLE_STEPS = 5


@dataclass(frozen=True)
class Figures:
    """Of one tenant: seconds from its coming to the last change of plan before it left, and from its leaving to the

    plan from before. Medians of steps in ms: of the old plan under the load, and of the plan that was changed to. None
    where there was no such thing.
    """

    before: str
    during: str
    after: str
    changed_s: float | None
    back_s: float | None
    changes_to: int
    changes_back: int
    old_ms: float | None
    new_ms: float | None

    @property
    def faults(self) -> list[str]:
        """What falls short, in words; a plan that stayed is right if it is the fastest under the load, too."""
        found = []
        if self.changed_s is not None and self.changed_s > CHANGED_S:
            found.append(f"the plan changed after {self.changed_s:.1f} s, expected at most {CHANGED_S:g}")
        if self.old_ms is not None and self.new_ms is not None and self.new_ms >= self.old_ms:
            found.append(f"{self.during} takes {self.new_ms:.2f} ms under the load, {self.before} {self.old_ms:.2f}")
        if self.after != self.before:
            found.append(f"ended with {self.after}, expected {self.before} again")
        elif self.back_s is not None and self.back_s > BACK_S:
            found.append(f"back after {self.back_s:.1f} s, expected at most {BACK_S:g}")
        for count, way in ((self.changes_to, "there"), (self.changes_back, "back")):
            if count > MOST_CHANGES:
                found.append(f"{count} changes of plan on the way {way}, expected at most {MOST_CHANGES}")
        return found


def figures(lines: Sequence[Line], came_s: float, left_s: float) -> Figures:
    """What the trace of a training shows, with the times of the tenant by the same clock."""
    decided = [line for line in lines if isinstance(line, Decided)]
    early, late = ([line for line in decided if line.at_s < when_s] for when_s in (came_s, left_s))
    if not early:
        raise ValueError("expected a decision before the tenant came, found none; let it come later")
    before, during, after = early[-1].plan, late[-1].plan, decided[-1].plan
    to, back = _changes(late[len(early) :], before), _changes(decided[len(late) :], during)
    under_load = [line for line in lines if isinstance(line, Stepped) and came_s + 1.0 < line.at_s < left_s]
    return Figures(
        before,
        during,
        after,
        to[-1].at_s - came_s if to else None,
        back[-1].at_s - left_s if back else None,
        len(to),
        len(back),
        _median_ms(under_load, before),
        _median_ms(under_load, during) if during != before else None,
    )


def _changes(decided: Sequence[Decided], plan: str) -> list[Decided]:
    found = []
    for line in decided:
        if line.plan != plan:
            found.append(line)
            plan = line.plan
    return found


def _median_ms(steps: Sequence[Stepped], plan: str) -> float | None:
    us = [step.us for step in steps if step.plan == plan]
    return statistics.median(us) / 1000 if len(us) > SETTLE_STEPS else None
