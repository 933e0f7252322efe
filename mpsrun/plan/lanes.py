"""Lanes as numbers: 0 is the lead's own stream, i >= 1 is worker i, and -i is side stream i of the lead."""

import re

LEAD = 0

_NAME = re.compile(r"lead|(?P<kind>worker|stream) (?P<number>[1-9][0-9]{0,8})")


def is_worker(lane: int) -> bool:
    """Whether the lane is another process."""
    return lane > LEAD


def is_stream(lane: int) -> bool:
    """Whether the lane is a side stream of the lead."""
    return lane < LEAD


def lane_name(lane: int) -> str:
    """`lead`, `worker 1` or `stream 1`."""
    if lane == LEAD:
        return "lead"
    return f"worker {lane}" if is_worker(lane) else f"stream {-lane}"


def lane_of(name: str) -> int | None:
    """The lane of which this is the name, or None where it is no lane's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found["kind"] is None:
        return LEAD
    return int(found["number"]) if found["kind"] == "worker" else -int(found["number"])
