"""One graph of one branch, which may run in any worker: its job there is made when it is first wanted."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpsrun import log
from mpsrun.errors import NotShippable
from mpsrun.graph.effects import analyze, drop_inert
from mpsrun.graph.regions import Region, whole
from mpsrun.plan.lanes import lane_name
from mpsrun.plan.plan import Assignment
from mpsrun.run import names, report
from mpsrun.run.binding import Binding
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.forkjoin import fork, join
from mpsrun.run.observe import Observation, Observer
from mpsrun.run.overlaps import Overlaps
from mpsrun.run.specialize import Cutter, Strand

MOST_VARIANTS = 64  # sets of sizes and modes of one graph that are kept prepared


@dataclass(frozen=True, eq=False)
class Job:
    """A branch's way to one worker and back, and its line in the report."""

    strand: Strand
    binding: Binding
    line: report.RegionReport


@dataclass(frozen=True, eq=False)
class Sent:
    """A branch under way in a worker."""

    job: Job
    handle: Any


@dataclass(eq=False)
class _Variant:
    """What is known for one set of sizes and modes. jobs: by worker; None where there can be none."""

    seen: Observation
    jobs: dict[int, Job | None] = field(default_factory=dict)
    in_lead: report.RegionReport | None = None


class Part:
    """A graph of a branch: what it costs, what it writes, how it runs in the lead and in workers.

    label: what the branch is called in the report.
    """

    def __init__(self, gm: fx.GraphModule, label: str, summary: report.Graph) -> None:
        drop_inert(gm)
        self._gm, self._label, self._summary = gm, label, summary
        self.code = gm.code
        self._effects = effects = analyze(gm)
        self.branch = whole(gm, effects)
        self.where = next((found for node in self.branch.nodes if (found := effects.where(node))), None)
        self.random = any(effects.facts[node].random for node in self.branch.nodes)
        self._region = Region(0, (self.branch,), where=self.where)
        self._overlaps = Overlaps(gm, effects)
        self._inputs = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        writes = frozenset[int]().union(*(facts.writes for facts in effects.facts.values()))
        self._written = [i for node, i in self._inputs.items() if effects.facts[node].outputs & writes]
        self._variants: dict[tuple[Any, ...], _Variant] = {}

    @property
    def kinds(self) -> set[str]:
        """The kinds of device that its ops use."""
        facts = [self._effects.facts[node] for node in self.branch.nodes]
        return {fact.device.type for fact in facts if fact.device is not None and not fact.floating}

    def storages(self, args: Sequence[Any]) -> set[int]:
        """The memory of the inputs, as numbers."""
        return {_storage(arg) for arg in args if isinstance(arg, torch.Tensor)}

    def written(self, args: Sequence[Any]) -> set[int]:
        """The memory of the inputs that it writes in place."""
        return {_storage(args[i]) for i in self._written}

    def overlapping(self, args: Sequence[Any]) -> bool:
        """Whether inputs lie over each other in a way that the graph was not compiled for."""
        return self._overlaps.now(args)

    def draws(self, coordinator: Coordinator, args: Sequence[Any]) -> int | None:
        """How far its random ops move the generator of a GPU; None where that is not known yet."""
        if not self.random or coordinator.device.kind != "cuda":
            return 0
        variant = self._variants.get(_key(coordinator, args))
        return None if variant is None else sum(variant.seen.random_steps.values())

    # ---- in the lead

    def here(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs, as plain PyTorch computes them."""
        return self._gm.forward(*args)

    def noted(self, coordinator: Coordinator, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs, as plain PyTorch computes them; the first time takes notes, from which jobs are made."""
        key = _key(coordinator, args)
        variant = self._variants.get(key)
        if variant is not None:
            if variant.in_lead is None:
                variant.in_lead = self._line(0, 0)
            variant.in_lead.calls += 1
            return self.here(args)
        observer = Observer(self._gm, self._effects, [self._region])
        outputs = observer.run(*args)
        while len(self._variants) >= MOST_VARIANTS:
            del self._variants[next(iter(self._variants))]
        self._variants[key] = _Variant(observer.observation)
        return outputs

    # ---- in a worker

    def job(self, coordinator: Coordinator, worker: int, args: Sequence[Any]) -> Job | None:
        """The job in this worker, made where it is not there yet and told where its parameters are.

        None where there can be none, or not yet.
        """
        variant = self._variants.get(_key(coordinator, args))
        if variant is None:
            return None
        if worker not in variant.jobs:
            try:
                variant.jobs[worker] = self._new_job(coordinator, worker, args, variant.seen)
            except NotShippable as error:
                self._summary.refuse(str(error), self.where)
                variant.jobs[worker] = None
        job = variant.jobs[worker]
        if job is not None:
            job = variant.jobs[worker] = self._tended(coordinator, job, args)
        try:
            if job is not None:
                job.binding.follow(args)
        except NotShippable as error:  # memory that no worker can see
            log.detail(f"a branch runs in the lead: {error}")
            return None
        return job

    def _tended(self, coordinator: Coordinator, job: Job, args: Sequence[Any]) -> Job | None:
        """The job in the process that its worker is now; None once it had no memory."""
        strand = job.strand
        reason = strand.crossing.no_memory()
        if reason is not None:
            log.say(f"{strand.where}: runs in the lead from now on: {reason}")
            return None
        strand.crossing = coordinator.setup.renew(strand.crossing, [self._value(node, args) for node in strand.args])
        return job

    def _new_job(self, coordinator: Coordinator, worker: int, args: Sequence[Any], seen: Observation) -> Job:
        cutter = Cutter(coordinator, self._effects, self._gm.graph.output_node().all_input_nodes)
        (strand,) = cutter.cut(self._region, Assignment((worker,)), seen).strands
        coordinator.setup.prepare(strand.crossing, [self._value(node, args) for node in strand.args])
        binding = Binding([strand], self._inputs)
        return Job(strand, binding, self._line(worker, strand.crossing.shares[0].job))

    def _line(self, worker: int, job: int) -> report.RegionReport:
        line = report.RegionReport(
            names.RegionName("Branches", ""), (worker,), (lane_name(worker),), (self._label,), (job,)
        )
        bisect.insort(self._summary.regions, line, key=lambda line: (line.branches, line.lanes))
        return line

    def send(self, job: Job, args: Sequence[Any]) -> Sent:
        """Have a worker start."""
        job.line.calls += 1
        return Sent(job, fork(job.strand.crossing, tuple(self._value(node, args) for node in job.strand.args)))

    def take(self, sent: Sent, args: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs, once they are there."""
        found = dict(zip(sent.job.strand.outputs, join(sent.handle), strict=True))
        outputs: Any = self._gm.graph.output_node().args[0]
        return fx.node.map_arg(outputs, lambda node: found[node] if node in found else self._value(node, args))

    def _value(self, node: fx.Node, args: Sequence[Any]) -> Any:
        return args[self._inputs[node]] if node in self._inputs else operator.attrgetter(str(node.target))(self._gm)


def _key(coordinator: Coordinator, args: Sequence[Any]) -> tuple[Any, ...]:
    modes = coordinator.epoch, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *modes, *(arg for arg in args if type(arg) is int)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
