"""A plan made runnable: the graph lowered for it, and the workers told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpsrun import log
from mpsrun.errors import NotShippable, in_a_line
from mpsrun.graph.channels_last import ChannelsLast
from mpsrun.graph.counters import lone_counters
from mpsrun.graph.effects import Effects
from mpsrun.graph.regions import Region
from mpsrun.graph.weights import own_weights
from mpsrun.plan import memory
from mpsrun.plan.lanes import LEAD
from mpsrun.plan.plan import Assignment, Plan
from mpsrun.run import cotuning, report
from mpsrun.run import state as modes
from mpsrun.run.binding import Binding
from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Crossing
from mpsrun.run.lower import Lowered, lower
from mpsrun.run.observe import Observation
from mpsrun.run.profile import Profiler, undisturbed
from mpsrun.run.recorder import Recorder, recorder
from mpsrun.run.relay_recorder import RelayRecorder
from mpsrun.run.specialize import Cutter, Strand
from mpsrun.run.subject import Subject


@dataclass(eq=False)
class Variant:
    """One plan for one set of sizes and modes.

    run: like the graph's `forward`. places: by strand, the graph's arguments that are its own, None for other values.
    is_plain: whether `run` is nothing but the graph. verified: how many of its calls were compared with plain PyTorch.
    """

    run: Callable[..., Any]
    binding: Binding
    strands: list[Strand]
    places: list[list[int | None]]
    reports: list[report.RegionReport]
    is_plain: bool
    ready: bool = False
    verified: int = 0
    _changes: int = 0
    _short: frozenset[Strand] = frozenset()

    @property
    def crossings(self) -> list[Crossing]:
        return [strand.crossing for strand in self.strands]

    @property
    def lacks_memory(self) -> bool:
        """Whether a region of it runs in the lead since a worker had no memory for it."""
        return bool(self._short)

    @property
    def failure(self) -> Exception | None:
        """Why it cannot be captured any more, if it was to be."""
        return self.run.failure if isinstance(self.run, Captured) else None

    def is_ready(self) -> bool:
        """Whether every worker has prepared its part, once."""
        if not self.ready:
            self.ready = all(crossing.is_ready() for crossing in self.crossings)
        return self.ready

    def is_whole(self) -> bool:
        """Whether every region can take its lanes now; while a worker is missing some run in the lead."""
        return all(crossing.is_open() or crossing.no_memory() is not None for crossing in self.crossings)

    def tend(self, args: Sequence[Any]) -> None:
        """A call with these arguments begins: have workers that were started again prepare their parts.

        Does not wait. Says once which regions stay in the lead since a worker had no memory for them.
        """
        if not self.strands or self._changes == (changes := self.strands[0].crossing.owner.changes):
            return
        self._changes = changes
        for strand, places in zip(self.strands, self.places, strict=True):
            values = [None if i is None else args[i] for i in places]
            strand.crossing = strand.crossing.owner.setup.renew(strand.crossing, values)
            reason = strand.crossing.no_memory()
            if reason is not None and strand not in self._short:
                self._short |= {strand}
                log.say(f"{strand.where}: runs in the lead from now on: {reason}")


class Maker:
    """Makes the variants of one graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        effects: Effects,
        regions: Sequence[Region],
        coordinator: Coordinator | None,
        subject: Subject,
        summary: report.Graph,
        formats: Callable[[], ChannelsLast | None],
    ) -> None:
        self._gm, self._effects, self._regions = gm, effects, regions
        self._subject, self._summary, self._formats = subject, summary, formats
        self._cutter = Cutter(coordinator, effects, list(gm.graph.output_node().all_input_nodes))
        self._position: Mapping[fx.Node, int] = {
            node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))
        }

    def make(self, plan: Plan, seen: Observation, args: Sequence[Any]) -> Variant:
        """Lower the graph for a plan, and have the workers prepare; `args` are those of a call. Does not wait.

        Regions that cannot be cut or lowered stay in the lead, with the reason in the report.
        """
        formats = self._formats() if plan.channels_last else None
        regions, run, strands = self._lower(self._cut_all(plan, seen), plan, formats)
        if plan.compiled:
            self._note_uncompiled(strands)
        places = [[self._position.get(node) for node in strand.args] for strand in strands]
        try:
            for strand, own in zip(strands, places, strict=True):
                strand.crossing.owner.setup.prepare(strand.crossing, [None if i is None else args[i] for i in own])
        except NotShippable as error:
            self._summary.note(str(error))
            regions, run, strands, places = [], self._gm.forward, [], []
        if formats is not None and torch._C._get_cudnn_benchmark():
            self._take_recommended(run, args)
        reports = [self._summary.accept(r.region, r.assignment, r.cut.jobs) for r in regions]
        binding = Binding(strands, self._position)
        captured = plan.captured and not self._draws(strands)
        if captured:
            run = Captured(self._subject, run, self._recorder(plan, regions, strands, seen, args))
        return Variant(run, binding, strands, places, reports, not reports and not captured)

    def _recorder(
        self,
        plan: Plan,
        regions: Sequence[Lowered],
        strands: Sequence[Strand],
        seen: Observation,
        args: Sequence[Any],
    ) -> Recorder:
        device = self._device(args)
        plainly = recorder(device)
        if strands:
            return RelayRecorder(plainly, strands)
        if not plan.tuned:
            return plainly
        profiler = Profiler(self._effects, seen, {node: args[i] for node, i in self._position.items()}, device.type)
        free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        most_bytes = memory.workspace_bytes(plan, self._regions, free_bytes)
        try:
            branches = cotuning.laned(regions, profiler)
        except NotShippable as error:
            log.say(f"convolutions keep the algorithms that are fastest alone: {error}")
            return plainly
        return cotuning.tuned(plainly, device, branches, cotuning.whole(self._subject.plain, args), most_bytes)

    def _take_recommended(self, run: Callable[..., Any], args: Sequence[Any]) -> None:
        """Have a graph meet its convolutions once, and torch keep the algorithms that cuDNN recommends for them.

        To time all of them once more for channels that come last would take as long as a script's first step.
        """
        kind = self._subject.kind
        try:
            with undisturbed(kind), modes.choosing(by_time=False), torch.autograd.set_multithreading_enabled(False):
                cotuning.whole(self._subject.plain, args, run)()
        except Exception as error:  # noqa: BLE001 - torch chooses later then
            log.detail(f"convolutions were not met in advance: {in_a_line(error)}")
        finally:
            torch.clear_autocast_cache()  # of what was made for this

    def _draws(self, strands: Sequence[Strand]) -> bool:
        """Whether a region on worker lanes draws random numbers: each call has others, and a recording constants."""
        where = [strand.where for strand in strands if strand.crossing.random]
        if where:
            self._summary.note(f"it runs uncaptured: random numbers are drawn beside or in a worker ({where[0]})")
        return bool(where)

    def _note_uncompiled(self, strands: Sequence[Strand]) -> None:
        for strand in strands:
            if not all(share.layout.compiled for share in strand.crossing.shares):
                self._summary.note(f"a branch is not compiled: it draws random numbers ({strand.where})")

    def _device(self, args: Sequence[Any]) -> torch.device:
        """The one of the graph's tensors: a graph of several is not captured."""
        return next(arg.device for arg in args if isinstance(arg, torch.Tensor))

    def _cut_all(self, plan: Plan, seen: Observation) -> list[Lowered]:
        """The regions that leave, outer ones first; a branch that left takes its inner regions along."""
        gone: set[fx.Node] = set()
        cuts = []
        for region in self._regions:
            choice = plan.regions.get(region.index)
            nodes = [node for branch in region.branches for node in branch.nodes]
            if not isinstance(choice, Assignment) or not any(choice.lanes) or not gone.isdisjoint(nodes):
                continue
            cut = self._cut(region, choice, seen, nodes, plan.compiled)
            if cut is not None:
                cuts.append(cut)
                for branch, lane in zip(region.branches, choice.lanes, strict=True):
                    gone.update(branch.nodes if lane != LEAD else ())
        return cuts

    def _cut(
        self, region: Region, choice: Assignment, seen: Observation, nodes: Sequence[fx.Node], compiled: bool
    ) -> Lowered | None:
        if region.parent is not None and any(node in seen.random_steps for node in nodes):
            reason = "random ops inside of another region keep to the order of the program"
            self._summary.refuse(reason, region.where)
            return None
        try:
            return Lowered(region, self._cutter.cut(region, choice, seen, compiled), choice)
        except NotShippable as error:
            self._summary.refuse(str(error), region.where)
            return None

    def _lower(
        self, regions: list[Lowered], plan: Plan, formats: ChannelsLast | None
    ) -> tuple[list[Lowered], Callable[..., Any], list[Strand]]:
        beside = own_weights(self._gm, self._effects) if plan.beside else {}
        counters = lone_counters(self._gm, self._effects) if plan.captured else frozenset()
        while regions:
            try:
                run, strands = lower(self._gm, self._effects, regions, formats, beside, counters)
                return regions, run, [*strands]
            except NotShippable as error:
                self._summary.refuse(str(error), regions[-1].region.where)
                regions = regions[:-1]
        if formats is None and not beside and not counters:
            return [], self._gm.forward, []
        return [], lower(self._gm, self._effects, [], formats, beside, counters)[0], []
