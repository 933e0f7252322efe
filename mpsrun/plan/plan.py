"""Which branch of which region runs on which lane, and the same as text."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpsrun.errors import UsageError
from mpsrun.graph.regions import Region
from mpsrun.plan.assign import not_worth_it, spread
from mpsrun.plan.cost import Costs
from mpsrun.plan.lanes import LEAD, WHOLE, is_stream, is_worker, lane_name, lane_of

CAPTURED = "captured"  # the line of a plan whose graph is replayed
TUNED = "convolutions tuned"  # and of one whose convolutions are tuned beside each other
CHANNELS_LAST = "channels last"  # of one whose convolutions have theirs last in memory
BESIDE = "weight gradients beside"  # of one that computes those of convolutions beside the rest of backward
COMPILED = "branches compiled"  # and of one whose workers compile their branches
# Each line with the field of a plan that it stands for.
MARKS = {CAPTURED: "captured", TUNED: "tuned", COMPILED: "compiled", CHANNELS_LAST: "channels_last", BESIDE: "beside"}


@dataclass(frozen=True)
class Means:
    """What the plans of a graph may make use of, beside the lead's stream and the workers.

    streams: the lead's device has side streams. captures: the graph can be captured; captures_workers: also with its
    regions on worker lanes. shares: lanes can have shares of the device. tunes: cuDNN may choose other algorithms.
    compiles: workers may compile their branches. turns: there are convolutions whose channels may come last. beside:
    there are such whose weights may have their gradients beside.
    """

    streams: bool = False
    captures: bool = False
    captures_workers: bool = False
    shares: bool = False
    tunes: bool = False
    compiles: bool = False
    turns: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Assignment:
    """One lane a branch, numbered as `lanes.py` says.

    shares: by branch, the percentage of the GPU's multiprocessors that its lane has; empty where each has all of them.
    """

    lanes: tuple[int, ...]
    shares: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """By branch, its lane with its share."""
        return tuple(map(lane_name, self.lanes, self.shares or (WHOLE,) * len(self.lanes)))

    def without(self, workers: Collection[int]) -> "Assignment":
        """What these workers would do in the lead, which has the whole GPU."""
        lanes = tuple(LEAD if lane in workers else lane for lane in self.lanes)
        shares = (WHOLE if lane == LEAD else share for lane, share in zip(lanes, self.shares, strict=False))
        return Assignment(lanes, some_shares(shares))


def some_shares(shares: Iterable[int]) -> tuple[int, ...]:
    """These, or nothing where every lane has the whole GPU."""
    found = tuple(shares)
    return found if any(share != WHOLE for share in found) else ()


@dataclass(frozen=True)
class Declined:
    """The region runs in the lead, and why, in one line."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """What each region does, by region index; `str(plan)` is text that `Plan.parse` reads back.

    captured: whether the whole graph is replayed as a CUDA graph. tuned: whether cuDNN's algorithms are chosen while
    the branches run beside each other. compiled: whether workers have Inductor compile their branches. channels_last:
    whether convolutions, and what they pass on, have the channels last in memory. beside: whether gradients of their
    weights are computed beside the rest of backward.
    """

    regions: Mapping[int, Assignment | Declined] = field(default_factory=dict)
    captured: bool = False
    tuned: bool = False
    compiled: bool = False
    channels_last: bool = False
    beside: bool = False

    def __str__(self) -> str:
        lines = [_line(index, choice) for index, choice in sorted(self.regions.items())]
        about = [mark for mark, name in MARKS.items() if getattr(self, name)]
        return "".join(f"{line}\n" for line in about + lines)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan from its own text; raises `UsageError` with the line that is none of a plan's."""
        return cls.parse_lines(enumerate(text.splitlines(), start=1), "plan")

    @classmethod
    def parse_lines(cls, lines: Iterable[tuple[int, str]], source: str) -> "Plan":
        """Read a plan from numbered lines of `source`; empty lines and those that start with `#` are skipped."""
        found: dict[int, Assignment | Declined] = {}
        about = set[str]()
        for number, line in lines:
            if line.strip() in MARKS:
                about.add(MARKS[line.strip()])
            elif line.strip() and not line.lstrip().startswith("#"):
                index, choice = _parse_line(line.strip(), f"{source}, line {number}")
                if index in found:
                    raise UsageError(
                        f"{source}, line {number}: expected one line a region, found a second one for region {index}; "
                        "keep one of them"
                    )
                found[index] = choice
        return cls(found, **dict.fromkeys(about, True))

    @property
    def workers(self) -> frozenset[int]:
        """The workers that it uses."""
        return frozenset(filter(is_worker, self._lanes()))

    def without(self, workers: Collection[int]) -> "Plan":
        """The same plan with what these workers would do in the lead."""
        regions = {
            index: choice.without(workers) if isinstance(choice, Assignment) else choice
            for index, choice in self.regions.items()
        }
        return replace(self, regions=regions)

    @property
    def streams(self) -> frozenset[int]:
        """The side streams of the lead that it uses."""
        return frozenset(filter(is_stream, self._lanes()))

    @property
    def has_shares(self) -> bool:
        """Whether a lane has only a part of the GPU."""
        return any(isinstance(choice, Assignment) and choice.shares for choice in self.regions.values())

    @property
    def is_serial(self) -> bool:
        """Whether everything runs on the lead's own stream, op by op: a plain run."""
        return not self.captured and all(lane == LEAD for lane in self._lanes())

    def _lanes(self) -> Iterable[int]:
        return (lane for choice in self.regions.values() if isinstance(choice, Assignment) for lane in choice.lanes)


def decide(
    region: Region, worker_ids: Sequence[int], costs: Costs, forced: bool, nesting: Collection[int] = ()
) -> Assignment | Declined:
    """Assign the branches of `region` to workers by longest processing time, or decline where it would not pay.

    `nesting`: the branches with regions of their own inside. Pinned branches stay in the lead; where nothing is pinned
    the lead keeps the shortest branch, and takes a share of the rest. `forced` skips the question whether it pays.
    """
    if not worker_ids:
        return Declined("there is no worker")
    reason = immovable(region)
    if reason is not None:
        return Declined(reason)
    lanes = spread(region, worker_ids, costs, nesting)
    if not forced:
        reason = not_worth_it(region, lanes, costs)
        if reason is not None:
            return Declined(reason)
    return Assignment(lanes)


def immovable(region: Region) -> str | None:
    """Why no branch of `region` can leave the lead, or None where one can."""
    if any(branch.pinned is None for branch in region.branches):
        return None
    return f"no branch can leave the lead: {region.branches[0].pinned}"


def left_with(region: Region, plan: Plan, regions: Mapping[int, Region]) -> tuple[int, int] | None:
    """The (region index, branch index) around `region` that is not on the lead's own stream: it takes `region` along.

    `regions`: all regions of the graph by index.
    """
    parent = region.parent
    while parent is not None:
        choice = plan.regions.get(parent[0])
        if isinstance(choice, Assignment) and choice.lanes[parent[1]] != LEAD:
            return parent
        parent = regions[parent[0]].parent
    return None


_LINE = re.compile(
    r"region (?P<index>[0-9]{1,9}): (?:declined, (?P<reason>.+)|(?P<lanes>(?:lead|worker|stream).*))", re.DOTALL
)


def _line(index: int, choice: Assignment | Declined) -> str:
    if isinstance(choice, Declined):
        return f"region {index}: declined, {' '.join(choice.reason.split())}"
    return f"region {index}: {' | '.join(choice.names)}"


def _parse_line(line: str, place: str) -> tuple[int, Assignment | Declined]:
    found = _LINE.fullmatch(line)
    if found is not None and found["reason"] is not None:
        return int(found["index"]), Declined(found["reason"])
    lanes = [lane_of(name) for name in found["lanes"].split(" | ")] if found is not None else []
    known = tuple(lane for lane in lanes if lane is not None)
    if found is None or len(known) != len(lanes):
        raise UsageError(
            f"{place}: expected 'region 0: lead | worker 1 | stream 1 at 25%', 'region 0: declined, reason', "
            f"{', '.join(map(repr, MARKS))}, found {line[:200]!r}; correct the line or delete it"
        )
    return int(found["index"]), Assignment(tuple(lane for lane, _ in known), some_shares(share for _, share in known))
