"""The `torch.compile` backend: from Dynamo's graph to a function that uses the lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpsrun import config, log
from mpsrun.errors import MpsrunError, NotShippable
from mpsrun.graph.effects import Effects, analyze, drop_inert
from mpsrun.graph.regions import Region, find_regions
from mpsrun.plan.cost import MACHINES
from mpsrun.plan.plan import Declined, plan_region
from mpsrun.run import report, session
from mpsrun.run.binding import Binding
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.lower import Lowered, lower
from mpsrun.run.observe import Observer, must_be_plain
from mpsrun.run.overlaps import Overlaps
from mpsrun.run.sizes import sizes_of
from mpsrun.run.specialize import Cutter, Observation, needed_nodes
from mpsrun.run.verify import Verification

LANES = ("auto", "serial", "workers")
MOST_MISSES = 16  # calls in a row with sizes of their own, after which nothing more is prepared
MOST_SPECIALS = 64  # sets of sizes of one graph that are kept prepared


def mpsrun(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001 - what a backend is called with
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile(model, backend="mpsrun", options={"lanes": "workers"})`.

    options: `lanes` ("auto", "serial" or "workers") and `workers` (use at most so many) for this model; the default is
    the launcher's. Raises `MpsrunError` for an option that does not exist.
    """
    chosen = Options.read(options or {}, mode)
    graph = Graph(gm, chosen)
    graph.summary.plain = graph.is_plain
    report.graphs.append(graph.summary)
    return gm.forward if graph.is_plain else graph


@dataclass(frozen=True)
class Options:
    """What a model may choose for itself."""

    lanes: str
    workers: int | None

    @classmethod
    def read(cls, options: Mapping[str, Any], mode: str | None) -> Options:
        """Raises `MpsrunError` where `torch.compile` was given something else."""
        unknown = set(options) - {"lanes", "workers"}
        if unknown or mode is not None:
            found = sorted(unknown) or f"mode={mode!r}"
            raise MpsrunError(f'expected no options but "lanes" and "workers", found {found}')
        lanes, workers = options.get("lanes", config.current().lanes), options.get("workers")
        if lanes not in LANES:
            raise MpsrunError(f"expected lanes to be one of {LANES}, found {lanes!r}")
        if workers is not None and (type(workers) is not int or workers < 1):
            raise MpsrunError(f"expected workers to be a whole number from 1, found {workers!r}")
        return cls(lanes, workers)


@dataclass
class _Special:
    """What a graph became for one set of sizes and modes: lowered regions and the function that runs them.

    verified: how many calls were compared with plain PyTorch.
    """

    epoch: int
    regions: list[Lowered]
    run: Callable[..., Any]
    binding: Binding
    reports: list[report.RegionReport]
    ready: bool = False
    verified: int = 0


class Graph:
    """One graph of Dynamo's, and what became of it.

    The first call for a set of sizes runs plain and takes notes; from them the workers are prepared. `entered` counts
    the calls of all graphs that may use lanes.
    """

    entered = 0

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self._gm = gm
        self._forced = options.lanes == "workers"
        self._most = options.workers
        self._misses = 0
        self._specials: dict[tuple[Any, ...], _Special] = {}
        self.summary = report.Graph()
        self._regions: tuple[Region, ...] = ()
        self._coordinator: Coordinator | None = None
        self._verification: Verification | None = None
        if options.lanes != "serial":
            try:
                self._look(gm)
            except Exception as error:  # a network that cannot be analysed still trains
                if config.current().strict:
                    raise
                log.say(f"a network could not be analysed, it runs in the lead ({type(error).__name__}: {error})")

    @property
    def is_plain(self) -> bool:
        """Whether nothing of this graph will ever use a lane."""
        return self._coordinator is None

    def _look(self, gm: fx.GraphModule) -> None:
        drop_inert(gm)
        self._effects: Effects = analyze(gm)
        found = find_regions(gm, self._effects)
        for refusal in found.refusals:
            self.summary.refuse(refusal.reason, refusal.where)
        self._regions = found.regions
        inner = {region.parent for region in found.regions}
        self._nesting = {
            region.index: [branch for branch in range(len(region.branches)) if (region.index, branch) in inner]
            for region in found.regions
        }
        for branch in (branch for region in found.regions for branch in region.branches if branch.pinned):
            self.summary.note(f"a branch stays in the lead: {branch.pinned}")
        self._overlaps = Overlaps(gm, self._effects)
        self._position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._sizes = sizes_of(gm, self._effects, needed_nodes(found.regions))
        if not found.regions:
            self.summary.note("no branches that do not depend on each other")
            return
        kind = self._device_kind()
        machine = MACHINES.get(kind)
        if machine is None:
            self.summary.note(f"no lanes on the device {kind}")
            return
        if not self._forced and not self._worth_it(machine):
            return
        self._coordinator = session.coordinator(kind)
        if self._coordinator is None:
            self.summary.note(session.why_none())
        elif config.current().verify:
            self._verification = Verification.of(gm, self._effects, kind)

    def _worth_it(self, machine: Any) -> bool:
        """Whether the plan would use any worker at all, were they all there."""
        workers = range(1, session.worker_count() + 1)[: self._most]
        plans = [
            plan_region(region, list(workers), machine, False, self._nesting[region.index]) for region in self._regions
        ]
        for region, plan in zip(self._regions, plans, strict=True):
            if isinstance(plan, Declined):
                self.summary.decline(region, plan.reason)
        return not all(isinstance(plan, Declined) for plan in plans)

    def _device_kind(self) -> str:
        devices = {
            facts.device.type
            for region in self._regions
            for branch in region.branches
            for node in branch.nodes
            if (facts := self._effects.facts[node]).device is not None and not facts.floating
        }
        return devices.pop() if len(devices) == 1 else "mixed: " + ", ".join(sorted(devices))

    def __call__(self, *args: Any) -> Any:
        Graph.entered += 1
        coordinator = self._coordinator
        if (
            coordinator is None
            or coordinator.closed
            or must_be_plain(coordinator.device.kind)
            or self._overlaps.now(args)
        ):
            return self._gm.forward(*args)
        key = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(args[i] for i in self._sizes),
        )
        special = self._specials.get(key)
        if special is None or special.epoch != coordinator.epoch:
            self._misses += 1
            return self._first(key, args) if self._misses <= MOST_MISSES else self._gm.forward(*args)
        self._misses = 0
        if not special.ready:
            special.ready = all(coordinator.is_ready(c) for r in special.regions for c in r.crossings)
            if not special.ready:
                return self._gm.forward(*args)
        coordinator.enter()
        try:
            special.binding.follow(args)
        except NotShippable as error:  # memory that no worker can see
            log.detail(f"a network runs in the lead: {error}")
            return self._gm.forward(*args)
        if special.reports:
            self.summary.called(special.reports)
            if self._verification is not None:
                return self._verified(self._verification, special, args)
        return special.run(*args)

    def _verified(self, verification: Verification, special: _Special, args: tuple[Any, ...]) -> Any:
        if special.verified == verification.steps:
            verification.settle()
            return special.run(*args)
        special.verified += 1
        return verification.call(special.run, args, special.verified)

    def _first(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        coordinator = self._coordinator
        if coordinator is None:
            raise RuntimeError("mpsrun: a graph without a coordinator")
        observer = Observer(self._gm, self._effects, self._regions)
        result = observer.run(*args)
        epoch = coordinator.epoch
        regions = self._cut_all(coordinator, observer.observation)
        regions, run = self._lower(regions)
        strands = [strand for lowered in regions for strand in lowered.cut.strands]
        try:
            for strand in strands:
                coordinator.prepare(strand.crossing, [observer.values.get(node) for node in strand.args])
        except NotShippable as error:
            self.summary.note(str(error))
            regions, run, strands = [], self._gm.forward, []
        binding = Binding(coordinator, strands, self._position)
        while len(self._specials) >= MOST_SPECIALS:
            del self._specials[next(iter(self._specials))]
        reports = [self.summary.accept(r.region, r.lanes, r.cut.jobs) for r in regions]
        special = self._specials[key] = _Special(epoch, regions, run, binding, reports)
        if self._forced and not coordinator.wait_ready([c for r in regions for c in r.crossings]):
            log.say("the workers did not get ready in time; the network runs in the lead until they are")
        special.ready = not regions
        return result

    def _cut_all(self, coordinator: Coordinator, seen: Observation) -> list[Lowered]:
        """The regions that go to workers, outer ones first; a branch that left takes its inner regions along."""
        cutter = Cutter(coordinator, self._effects, list(self._gm.graph.output_node().all_input_nodes))
        machine = MACHINES[coordinator.device.kind]
        gone: set[fx.Node] = set()
        cuts = []
        for region in self._regions:
            if any(node in gone for branch in region.branches for node in branch.nodes):
                continue
            nesting = self._nesting[region.index]
            plan = plan_region(region, coordinator.usable()[: self._most], machine, self._forced, nesting)
            if isinstance(plan, Declined):
                self.summary.decline(region, plan.reason)
                continue
            if region.parent is not None and any(n in seen.random_steps for b in region.branches for n in b.nodes):
                self.summary.refuse(
                    "random ops inside of another region keep to the order of the program", region.where
                )
                continue
            try:
                cut = cutter.cut(region, plan, seen)
            except NotShippable as error:
                self.summary.refuse(str(error), region.where)
                continue
            for branch, lane in zip(region.branches, plan.lanes, strict=True):
                gone.update(branch.nodes if lane else ())
            cuts.append(Lowered(region, cut, plan.lanes))
        return cuts

    def _lower(self, regions: list[Lowered]) -> tuple[list[Lowered], Callable[..., Any]]:
        while regions:
            try:
                return regions, lower(self._gm, self._effects, regions)
            except NotShippable as error:
                self.summary.refuse(str(error), regions[-1].region.where)
                regions = regions[:-1]
        return [], self._gm.forward
