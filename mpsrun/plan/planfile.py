"""The plans of several graphs in one file, as text that people read and edit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpsrun.errors import UsageError
from mpsrun.graph.regions import Region
from mpsrun.plan.lanes import LEAD, lane_name
from mpsrun.plan.plan import Assignment, Means, Plan, left_with

HEADER = "# mpsrun plan 1"

_GRAPH = re.compile(r"graph (?P<fingerprint>[0-9a-f]{8,64})(?:\s+(?P<description>\S.*))?")
_Lines = list[tuple[int, str]]


@dataclass(frozen=True)
class GraphPlan:
    """The plan of one graph, and what people call the graph."""

    description: str
    plan: Plan


@dataclass(frozen=True)
class PlanFile:
    """Plans by the fingerprint of their graph, which is 8 to 64 lower-case hex digits.

    `str(file)` is the text of a file that `PlanFile.parse` reads back. `source` names the file in errors.
    """

    graphs: Mapping[str, GraphPlan] = field(default_factory=dict)
    source: str = field(default="plan file", compare=False)

    def __str__(self) -> str:
        parts = (
            f"\ngraph {fingerprint}  {' '.join(graph.description.split())}".rstrip() + f"\n{graph.plan}"
            for fingerprint, graph in self.graphs.items()
        )
        return f"{HEADER}\n{''.join(parts)}"

    @classmethod
    def parse(cls, text: str, source: str = "plan file") -> "PlanFile":
        """Read a file's text; raises `UsageError` with the line that does not belong there."""
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if not lines or lines[0][1] != HEADER:
            found = f"{lines[0][1][:200]!r} in line {lines[0][0]}" if lines else "an empty file"
            raise UsageError(f"{source}: expected {HEADER!r} at the top, found {found}; write one with --save-plan")
        graphs = {}
        for number, fingerprint, description, body in _sections(lines[1:], source):
            if fingerprint in graphs:
                raise UsageError(
                    f"{source}, line {number}: expected each graph once, found {fingerprint} again; keep one of them"
                )
            graphs[fingerprint] = GraphPlan(description, Plan.parse_lines(body, source))
        return cls(graphs, source)

    def with_plan(self, fingerprint: str, description: str, plan: Plan) -> "PlanFile":
        """The same file with this plan for this graph."""
        return PlanFile({**self.graphs, fingerprint: GraphPlan(description, plan)}, self.source)

    def plan_for(self, fingerprint: str) -> Plan:
        """The plan of a graph; raises `UsageError` where the file has none, since it is for another network."""
        graph = self.graphs.get(fingerprint)
        if graph is None:
            known = ", ".join(f"{key} {graph.description}".rstrip() for key, graph in self.graphs.items()) or "none"
            raise UsageError(
                f"{self.source}: expected a plan for graph {fingerprint}, found plans for: {known}; "
                "the network or its sizes are others than when it was written: write a new one with --save-plan"
            )
        return graph.plan


def fits(plan: Plan, regions: Sequence[Region], worker_count: int, means: Means) -> str | None:
    """Why `plan` cannot be followed for these regions with workers 1 to `worker_count`, or None where it can."""
    known = {region.index: region for region in regions}
    if set(plan.regions) != set(known):
        return f"it is for another network: expected regions {_list(known)}, found {_list(plan.regions)}"
    if plan.workers and max(plan.workers) > worker_count:
        return f"it uses worker {max(plan.workers)}, and the run has {worker_count}; start more with --workers"
    if plan.captured and not means.captures:
        return "it is captured, which this graph cannot be here (--verbose says why)"
    if plan.captured and plan.workers and plan.streams:
        return (
            f"it is captured and uses both workers and {lane_name(min(plan.streams))}, which cannot be; use one of them"
        )
    if plan.tuned and not (plan.captured and means.tunes and not plan.workers):
        return (
            "it has convolutions tuned, for which it must be captured, without workers, and --tune-convolutions given"
        )
    if plan.compiled and not (means.compiles and plan.workers):
        return (
            "it has branches compiled, for which it must use workers, --compile-branches be given, and PyTorch not be "
            "set to deterministic algorithms"
        )
    if plan.channels_last and not (plan.captured and means.turns and not plan.workers and not plan.tuned):
        return (
            "it has channels last, for which it must be captured, without workers and tuned convolutions, and the "
            "network have convolutions that use tensor cores, without PyTorch's deterministic algorithms, --verify "
            "and --channels-last off"
        )
    if plan.beside and not (plan.captured and means.beside and not plan.workers and not plan.tuned):
        return (
            "it has weight gradients beside, for which it must be captured, without workers and tuned convolutions, "
            "and the network have convolutions of images with weights of their own, on a GPU with cuDNN"
        )
    if plan.streams and not means.streams:
        return f"it uses {lane_name(min(plan.streams))}, and this device has no streams"
    if plan.has_shares and not means.shares:
        return "it gives lanes a share of the multiprocessors, which this device or its driver cannot"
    reasons = (_misfit(region, plan, known) for region in regions)
    return next((reason for reason in reasons if reason is not None), None)


def _misfit(region: Region, plan: Plan, regions: Mapping[int, Region]) -> str | None:
    choice = plan.regions[region.index]
    if not isinstance(choice, Assignment):
        return None
    if len(choice.lanes) != len(region.branches):
        return (
            f"it is for another network: expected {len(region.branches)} lanes for region {region.index}, "
            f"found {len(choice.lanes)}"
        )
    share_of = dict(zip(choice.lanes, choice.shares, strict=False))
    if any(share_of[lane] != share for lane, share in zip(choice.lanes, choice.shares, strict=False)):
        return f"a lane has two shares in region {region.index}; give each of its branches the same one"
    outer = left_with(region, plan, regions)
    if outer is not None:
        return f"region {region.index} lies inside branch {outer[1]} of region {outer[0]}, which leaves; decline one"
    for index, (branch, lane) in enumerate(zip(region.branches, choice.lanes, strict=True)):
        if branch.pinned is not None and lane != LEAD:
            return f"branch {index} of region {region.index} must stay in the lead ({branch.pinned})"
    return None


def _sections(lines: _Lines, source: str) -> list[tuple[int, str, str, _Lines]]:
    """(line number, fingerprint, description, lines of its plan) of every graph."""
    found: list[tuple[int, str, str, _Lines]] = []
    for number, line in lines:
        header = _GRAPH.fullmatch(line)
        if header is not None:
            found.append((number, header["fingerprint"], header["description"] or "", []))
        elif found and not line.startswith("graph"):
            found[-1][3].append((number, line))
        elif not line.startswith("#"):
            raise UsageError(
                f"{source}, line {number}: expected 'graph FINGERPRINT  description' before the regions of a graph, "
                f"found {line[:200]!r}; correct or delete the line"
            )
    return found


def _list(indexes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(indexes))) or "none"
