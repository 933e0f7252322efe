"""An explanation as a text tree."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mpsrun.run.explanation import Bound, BranchPart, CandidatePart, Explanation, PlanPart, RegionPart

WIDTH = 150
NOTHING = "nothing to explain: no network was called a second time, or only such as run plain"


def text_of(explanation: Explanation) -> str:
    """One tree for each network, the lines not longer than `WIDTH`."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False)
    for number in range(len(explanation.networks)):
        console.print(_network(explanation, number))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines) if lines else NOTHING


def _network(explanation: Explanation, number: int) -> Tree:
    regions = [region for region in explanation.regions if region.network == number]
    network = explanation.networks[number]
    bound = f", {_bound(network.bound)}" if regions else ""
    tree = Tree(Text(f"{network.name}: {_size(regions)}{bound}"))
    for plan in (plan for plan in explanation.plan if plan.network == number):
        _add_plan(tree, plan)
    for region in regions:
        _add_region(tree, region)
    refused = [part for part in explanation.refused if part.network == number]
    if refused:
        node = tree.add("refused")
        for part in refused:
            node.add(Text(f"{part.where}: {part.reason}" if part.where else part.reason))
    return tree


def _size(regions: list[RegionPart]) -> str:
    if not regions:
        return "no branches that could run at the same time"
    branches = sum(len(region.branches) for region in regions)
    return f"{_count(len(regions), 'region')}, {_count(branches, 'branch')}"


def _add_plan(tree: Tree, plan: PlanPart) -> None:
    node = tree.add(Text(f"plan ({plan.source}): {plan.name}"))
    table = Table.grid(padding=(0, 2))
    for candidate in plan.candidates:
        table.add_row(*map(Text, _candidate(candidate, candidate.name == plan.name)))
    node.add(table)


def _candidate(candidate: CandidatePart, is_chosen: bool) -> Iterator[str]:
    yield f"{'*' if is_chosen else ' '} {candidate.name}"
    yield f"all regions {_ms(candidate.predicted_us)} predicted"
    if candidate.predicted_step_us is not None:
        yield f"a step {_ms(candidate.predicted_step_us)} predicted"
    if candidate.measured_step_us is not None:
        yield f"{_ms(candidate.measured_step_us)} measured"


def _add_region(tree: Tree, region: RegionPart) -> None:
    name = " ".join(filter(None, (region.kind, region.name)))
    how = "" if region.measured else ", times estimated"
    node = tree.add(Text(f"region {region.index}, {name}: {_bound(region.bound)}{how}"))
    if region.where:
        node.add(Text(region.where))
    if region.parent is not None:
        node.add(Text(f"inside branch {region.parent[1]} of region {region.parent[0]}"))
    if region.plan.declined:
        node.add(Text(f"stays in the lead: {region.plan.declined}"))
    table = Table.grid(padding=(0, 2))
    for branch in region.branches:
        table.add_row(*map(Text, _branch(branch)))
    node.add(table)
    for branch in region.branches:
        for why in filter(None, (branch.pinned and f"must stay in the lead: {branch.pinned}", branch.not_measured)):
            node.add(Text(f"{branch.name}: {why}"))


def _branch(branch: BranchPart) -> Iterator[str]:
    yield f"{'*' if branch.critical else ' '} {branch.name}"
    yield branch.lane
    yield _ms(branch.time_us)
    yield (
        "" if branch.forward_us is None else f"({branch.forward_us / 1e3:.2f} + {(branch.backward_us or 0) / 1e3:.2f})"
    )
    yield _count(branch.kernels, "kernel")
    yield f"{branch.flops / 1e6:,.1f} MFLOP"
    yield f"{(branch.bytes_in + branch.bytes_out) / 2**20:.2f} MiB cross"
    if branch.peak_bytes is not None:
        yield f"{branch.peak_bytes / 2**20:.1f} MiB of memory"
    if branch.sm_demand is not None:
        yield f"{branch.sm_demand:.0%} of the SMs"


def _bound(bound: Bound) -> str:
    text = (
        f"at most {bound.speed_up:.2f}x, {_ms(bound.serial_us)} in turn, {_ms(bound.critical_us)} on the critical path"
    )
    return text if bound.step_speed_up is None else f"{text}, a whole step at most {bound.step_speed_up:.2f}x"


def _count(count: int, noun: str) -> str:
    plural = "es" if noun.endswith("h") else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f} ms"
