"""Lanes as numbers: 0 is the lead's own stream, i >= 1 is worker i, and -i is side stream i of the lead.

A lane other than the lead's may have a share of the GPU's multiprocessors, in percent.
"""

import re

LEAD = 0
WHOLE = 100  # the share of a lane that may use all multiprocessors

_NAME = re.compile(r"lead|(?P<kind>worker|stream) (?P<number>[1-9][0-9]{0,8})(?: at (?P<share>[1-9][0-9]?)%)?")


def is_worker(lane: int) -> bool:
    """Whether the lane is another process."""
    return lane > LEAD


def is_stream(lane: int) -> bool:
    """Whether the lane is a side stream of the lead."""
    return lane < LEAD


def lane_name(lane: int, share: int = WHOLE) -> str:
    """`lead`, `worker 1` or `stream 1`, or `stream 1 at 25%`."""
    if lane == LEAD:
        return "lead"
    name = f"worker {lane}" if is_worker(lane) else f"stream {-lane}"
    return name if share == WHOLE else f"{name} at {share}%"


def lane_of(name: str) -> tuple[int, int] | None:
    """The lane and the share (percent) of which this is the name, or None where it is no lane's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found["kind"] is None:
        return LEAD, WHOLE
    lane = int(found["number"]) if found["kind"] == "worker" else -int(found["number"])
    return lane, int(found["share"] or WHOLE)
