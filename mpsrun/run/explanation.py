"""What `mpsrun explain` tells, as data. Importing it imports no torch: a script may end without it."""

from __future__ import annotations

import msgspec


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """How much could be gained at best, crossings left out: microseconds of forward and backward.

    serial_us: one branch after the other. critical_us: along the critical path. step_speed_up: of a whole training
    step, where one was timed.
    """

    serial_us: float
    critical_us: float
    speed_up: float
    step_speed_up: float | None = None


class BranchPart(msgspec.Struct, frozen=True, kw_only=True):
    """A branch; time_us: alone, forward and backward, measured or estimated.

    not_measured: why there are no times of its own. pinned: why it cannot leave the lead. critical: whether the
    critical path goes through it. bytes_in, bytes_out: what would cross to a worker and back. peak_bytes: of the
    device's memory; sm_demand: the part of its multiprocessors that the kernels fill, by time. Both None on a CPU.
    """

    name: str
    lane: str
    time_us: float
    forward_us: float | None
    backward_us: float | None
    not_measured: str | None
    pinned: str | None
    critical: bool
    bytes_in: int
    bytes_out: int
    kernels: int
    flops: int
    peak_bytes: int | None
    sm_demand: float | None


class RegionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The lanes of a region's branches; declined: why all of them are the lead."""

    lanes: tuple[str, ...]
    declined: str | None


class RegionPart(msgspec.Struct, frozen=True, kw_only=True):
    """A region of the network with this number; parent: (region, branch) around it. where: the user's line."""

    network: int
    index: int
    name: str
    kind: str
    where: str | None
    parent: tuple[int, int] | None
    measured: bool
    bound: Bound
    plan: RegionPlan
    branches: tuple[BranchPart, ...]


class CandidatePart(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was thought of. predicted_us: of all regions. The steps are whole training steps, in microseconds."""

    name: str
    predicted_us: float
    predicted_step_us: float | None = None
    measured_step_us: float | None = None


class PlanPart(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a network. source: "tuned", "cached", "pinned", "forced" or "estimated". text: as in a plan file."""

    network: int
    name: str
    source: str
    text: str
    predicted_us: float
    predicted_step_us: float | None
    measured_step_us: float | None
    candidates: tuple[CandidatePart, ...]


class NetworkPart(msgspec.Struct, frozen=True, kw_only=True):
    """A network at the sizes and modes of one call."""

    name: str
    bound: Bound


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """What cannot run on lanes, and why; where: the user's line."""

    network: int
    reason: str
    where: str | None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Networks by their number, and everything that was found of them; `str()` of it is a tree.

    bound: of all networks together.
    """

    networks: tuple[NetworkPart, ...] = ()
    regions: tuple[RegionPart, ...] = ()
    bound: Bound = Bound(serial_us=0.0, critical_us=0.0, speed_up=1.0)
    plan: tuple[PlanPart, ...] = ()
    refused: tuple[Refused, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As dicts, lists, strings and numbers."""
        return msgspec.json.decode(msgspec.json.encode(self))

    def to_json(self) -> str:
        """As JSON, one line."""
        return msgspec.json.encode(self).decode()

    def __str__(self) -> str:
        from mpsrun.run.explain_tree import text_of

        return text_of(self)
