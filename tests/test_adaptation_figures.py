"""What is read from the trace of a training beside a tenant."""

import pytest

from benchmarks.adaptation import Figures, figures
from mpsrun.monitor.trace import Decided, Line, Stepped


def steps(begin_s: int, end_s: int, plan: str, ms: float) -> list[Line]:
    return [Stepped(at_s + 0.5, "g", plan, ms * 1000) for at_s in range(begin_s, end_s)]


def decision(at_s: float, plan: str) -> Decided:
    return Decided(at_s, "g", plan, "why")


WELL = [
    decision(5, "workers"),
    *steps(5, 30, "workers", 20.0),
    *steps(30, 40, "workers", 80.0),
    decision(36, "streams"),
    *steps(36, 60, "streams", 45.0),
    decision(67, "workers"),
    *steps(67, 90, "workers", 20.0),
]


def test_a_plan_that_follows() -> None:
    found = figures(WELL, came_s=30, left_s=60)
    assert found == Figures("workers", "streams", "workers", 6, 7, 1, 1, 80.0, 45.0)
    assert found.faults == []


@pytest.mark.parametrize(
    ("came_s", "left_s", "lines", "fault"),
    [
        (20, 60, WELL, "the plan changed after 16.0 s, expected at most 10"),
        (30, 40, WELL, "back after 27.0 s, expected at most 20"),
        (30, 60, [*WELL, decision(95, "serial")], "ended with serial, expected workers again"),
        (30, 60, [*WELL, decision(70, "serial"), decision(75, "workers")], "3 changes of plan on the way back"),
        (30, 60, [*WELL, *steps(40, 60, "streams", 99.0), *steps(40, 60, "streams", 99.0)], "takes 99.00 ms under"),
    ],
)
def test_what_falls_short(came_s: float, left_s: float, lines: list[Line], fault: str) -> None:
    assert any(fault in found for found in figures(lines, came_s, left_s).faults)


def test_a_plan_that_stays_is_no_fault_and_no_plan_is_one() -> None:
    stays = [decision(5, "serial"), *steps(5, 90, "serial", 40.0)]
    assert figures(stays, 30, 60).faults == []
    with pytest.raises(ValueError, match="let it come later"):
        figures(steps(5, 90, "serial", 40.0), 30, 60)
