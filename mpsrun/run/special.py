"""The plans that a graph may run under for one set of sizes and modes, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from mpsrun import config, log
from mpsrun.device.shares import shares
from mpsrun.errors import NotShippable
from mpsrun.graph.channels_last import FLOATING, REDUCED, ChannelsLast, what_may
from mpsrun.graph.effects import Effects
from mpsrun.graph.regions import Region
from mpsrun.graph.weights import own_weights
from mpsrun.plan import memory
from mpsrun.plan.candidates import (
    Candidate,
    candidates,
    compiled,
    forced,
    forced_captured,
    forced_captured_workers,
    forced_streams,
    with_channels_last,
)
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.plan.plan import Means
from mpsrun.run import plans, report
from mpsrun.run import state as modes
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.cotuning import has_convolutions
from mpsrun.run.observe import Observation
from mpsrun.run.options import Options
from mpsrun.run.plan_cache import Entry, Key
from mpsrun.run.profile import Profiler, measured_us
from mpsrun.run.shortage import lacks_memory
from mpsrun.run.subject import Subject
from mpsrun.run.tuning import Tuning
from mpsrun.run.variant import Variant

MEASURED = {"cuda"}  # the devices on which branches are timed alone; on a CPU hardly anything is worth a try
_BranchUs = Mapping[int, Sequence[float]]


@dataclass(eq=False)
class Special:
    """What a graph became for one set of sizes and modes.

    candidates: the plans that it may run under, with `variants` of those that were made. tuning: chooses between them;
    None where there is only one. epoch: how many workers were lost when that one was planned. branch_us: by region
    index, the measured times of its branches alone. captures: whether it may be captured, as far as is known.
    is_lasting: whether what is chosen is for other runs, too. whole_under: what `Coordinator.stirs` was when all
    variants could run, which then need not be looked at in each of the steps that are compared.
    """

    description: str
    seen: Observation
    candidates: tuple[Candidate, ...]
    key: Key
    epoch: int
    tuning: Tuning | None = None
    variants: dict[int, Variant] = field(default_factory=dict)
    branch_us: _BranchUs = field(default_factory=dict)
    captures: bool = True
    is_lasting: bool = True
    whole_under: tuple[int, ...] | None = None


class Planner:
    """Makes the specials of one graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        effects: Effects,
        regions: Sequence[Region],
        kind: str,
        options: Options,
        summary: report.Graph,
    ) -> None:
        self._gm, self._effects, self._regions, self._kind, self._options = gm, effects, regions, kind, options
        self._summary = summary
        self._uses_lanes = False  # for any sizes
        self._formats: dict[frozenset[torch.dtype], ChannelsLast | None] = {}
        self.subject = Subject(gm, effects, kind)
        if self.subject.refusal and self._may_capture:
            summary.note(f"it cannot be captured: {self.subject.refusal}")
        if config.current().compile_branches and not self.compiles:
            summary.note("its branches are not compiled: PyTorch is set to deterministic algorithms")
        if config.current().channels_last == "on" and not self.turns:
            summary.note("nothing has its channels last: there is no convolution of images that may")

    @property
    def has_streams(self) -> bool:
        """A CPU has none; there `streams` only shows that nothing else changes, as `captured` does."""
        return self._kind == "cuda" or self._options.lanes in ("streams", "captured")

    @property
    def _may_capture(self) -> bool:
        forced = self._options.lanes in ("captured", "captured-workers")
        return forced or (self._kind == "cuda" and self._options.lanes == "auto")

    @property
    def captures(self) -> bool:
        """Whether this graph can be captured, and may be."""
        return self._may_capture and self.subject.refusal is None

    @property
    def has_shares(self) -> bool:
        """Whether lanes can have a share of the GPU's multiprocessors, and workers were not started with one."""
        if self._kind != "cuda" or config.current().worker_share is not None:
            return False
        return shares(torch.device("cuda", torch.cuda.current_device())).refusal is None

    @property
    def tunes(self) -> bool:
        """Whether cuDNN may choose other algorithms: the user lets it, and there is a choice."""
        fixed = _wants_same_bits()
        asked = config.current().tune_convolutions
        if self._kind != "cuda" or not asked or fixed or not torch._C._get_cudnn_enabled():
            return False
        return any(has_convolutions(branch) for region in self._regions for branch in region.branches)

    @property
    def turns(self) -> bool:
        """Whether a plan may have its channels last."""
        return self.channels_last is not None

    @property
    def channels_last(self) -> ChannelsLast | None:
        """What may have its channels last; None where nothing may: not asked for, or of no use."""
        dtypes, asked = REDUCED, config.current().channels_last
        if asked == "on":
            dtypes = FLOATING
        elif self._kind != "cuda" or asked == "off" or _wants_same_bits() or not torch._C._get_cudnn_enabled():
            return None
        elif modes.convolves_in_tf32():
            dtypes |= {torch.float32}
        if dtypes not in self._formats:
            self._formats[dtypes] = what_may(self._gm, self._effects, dtypes)
        return self._formats[dtypes]

    @property
    def has_gradients_beside(self) -> bool:
        """Whether gradients of weights may be computed beside the rest of backward."""
        if self._kind != "cuda" or not torch.is_grad_enabled() or not torch._C._get_cudnn_enabled():
            return False
        return bool(own_weights(self._gm, self._effects))

    @property
    def compiles(self) -> bool:
        """Whether workers may compile their branches: the user lets them, and results may differ by rounding."""
        return config.current().compile_branches and not _wants_same_bits()

    def candidates(
        self, workers: Sequence[int], branch_us: _BranchUs | None = None, captures: bool = True
    ) -> tuple[Candidate, ...]:
        """The plans to choose from with these workers; a forced lane leaves no choice.

        A graph that can be captured has no need of workers, which then take no memory: branches on streams in one
        recording were faster on every network that was measured. `captures`: whether it may be, as far as is known.
        """
        costs, workers = Costs(MACHINES[self._kind], branch_us or {}), list(workers)[: self._options.workers]
        if self._options.lanes == "captured" and self.captures:
            return (self._maybe_channels_last(forced_captured(self._regions, costs)),)
        if self._options.lanes == "captured-workers" and self.captures:
            return (self._maybe_compiled(forced_captured_workers(self._regions, workers, costs)),)
        if self._options.lanes in ("streams", "captured"):
            return (forced_streams(self._regions, costs),)
        if self._options.forced:
            return (self._maybe_compiled(forced(self._regions, workers, costs)),)
        means = self._means(captures)
        workers = [] if means.captures and not means.compiles else workers
        if config.current().channels_last == "on":  # all that may
            means = replace(means, turns=False)
        return tuple(map(self._maybe_channels_last, candidates(self._regions, workers, costs, means)))

    def _means(self, captures: bool = True) -> Means:
        captures = captures and self.captures
        # Random numbers of branches are not captured: it would be the uncaptured plan once more.
        with_workers = captures and not any(self._draws(region) for region in self._regions)
        return Means(
            self.has_streams,
            captures,
            with_workers,
            self.has_shares,
            self.tunes,
            self.compiles,
            self.turns,
            self.has_gradients_beside,
        )

    def _maybe_compiled(self, candidate: Candidate) -> Candidate:
        return compiled(candidate) if self.compiles and candidate.plan.workers else candidate

    def _maybe_channels_last(self, candidate: Candidate) -> Candidate:
        """The same, with its channels last if that is asked for."""
        if config.current().channels_last != "on" or not self.turns:
            return candidate
        plan = candidate.plan
        return with_channels_last(candidate) if plan.captured and not plan.workers else candidate

    def _draws(self, region: Region) -> bool:
        facts = self._effects.facts
        return any(facts[node].random for branch in region.branches for node in branch.nodes)

    def special(
        self, owner: Coordinator | None, args: Sequence[Any], seen: Observation, failure: Exception | None = None
    ) -> Special:
        """The plans for the sizes of these arguments: one that is forced or pinned, or several to tune.

        failure: why they could not be captured in this run, if so.
        """
        workers = [link.index for link in owner.links] if owner is not None else []
        usable = owner.usable() if owner is not None else []
        key = plans.key_of(self._gm, args, self._kind, len(usable))
        special = Special(describe(args), seen, (), key, owner.epoch if owner is not None else 0)
        if self._options.forced:
            special.candidates = self.candidates(usable)
        elif (plan := plans.pinned(plans.fingerprint(key), self._regions, len(workers), self._means())) is not None:
            gone = frozenset(workers) - {*usable}
            special.candidates = (Candidate("pinned", plan.without(gone), 0.0),)
        else:
            self._tune(special, owner, args, failure)
        return special

    def _tune(
        self, special: Special, owner: Coordinator | None, args: Sequence[Any], failure: Exception | None
    ) -> None:
        """Several candidates, made from what branches take alone, and the tuning that chooses between them."""
        usable, entry = owner.usable() if owner is not None else [], plans.cache().load(special.key)
        special.captures = failure is None and (entry is None or entry.captures)
        special.is_lasting = failure is None or _is_lasting(failure)
        special.candidates = self.candidates(usable, captures=special.captures)
        if entry is None and owner is not None and any(c.plan.workers for c in special.candidates):
            owner.begin()  # while branches are timed
        special.branch_us = self._branch_us(special, entry, args)
        special.candidates = self._affordable(self.candidates(usable, special.branch_us, special.captures), owner)
        special.tuning = self._tuning(special, owner, entry)

    def _branch_us(self, special: Special, entry: Entry | None, args: Sequence[Any]) -> _BranchUs:
        """What an earlier run measured, which leads to the same candidates again, or what is measured now."""
        if entry is not None:
            return entry.branch_us
        if self._kind not in MEASURED or len(special.candidates) == 1:
            return {}
        values = dict(zip(self._gm.graph.find_nodes(op="placeholder"), args, strict=True))
        profiler = Profiler(self._effects, special.seen, values, self._kind)
        return measured_us(profiler.times(self._regions, Costs(MACHINES[self._kind])))

    def _affordable(self, found: tuple[Candidate, ...], owner: Coordinator | None) -> tuple[Candidate, ...]:
        if self._kind != "cuda":
            return found
        started = [link.index for link in owner.links if link.started] if owner is not None else []
        return memory.affordable(found, self._regions, torch.cuda.mem_get_info()[0], started)

    def _tuning(self, special: Special, owner: Coordinator | None, entry: Entry | None) -> Tuning:
        epoch, is_first = special.epoch, True

        def decided(chosen: int) -> None:
            nonlocal is_first
            self._summary.undecided.discard(special.description)
            self._chosen(special, chosen)
            # what a lost worker left to choose from, and what a load made of it, is not for other runs
            if tuning.is_home and special.is_lasting and (owner is None or owner.epoch == epoch):
                self._cache(special, chosen)
            if owner is not None and (is_first or tuning.is_short_of_memory):  # what only other candidates needed
                owner.trim()
            is_first = False

        def can_run() -> bool:
            return all(variant.is_ready() for variant in special.variants.values())

        tuning = Tuning(special.description, special.candidates, self._kind, decided, can_run)
        known = [i for i, c in enumerate(special.candidates) if entry is not None and str(c.plan) == entry.plan]
        if known:
            log.say(f"{special.description}: {special.candidates[known[0]].name}, which an earlier run found best")
            tuning.settle(known[0])
            self._chosen(special, known[0])
        else:
            self._summary.undecided.add(special.description)
        return tuning

    def _chosen(self, special: Special, chosen: int) -> None:
        plan = special.candidates[chosen].plan
        kept = {chosen} | (special.tuning.kept if special.tuning is not None else frozenset())
        special.variants = {i: variant for i, variant in special.variants.items() if i in kept}
        self._uses_lanes = self._uses_lanes or not plan.is_serial
        if self._summary.rests is None:
            self._summary.plain = not self._uses_lanes
        self._summary.chosen[special.description] = special.candidates[chosen].name
        if special.tuning is None or special.tuning.is_home:
            plans.keep(plans.fingerprint(special.key), special.description, plan)

    def _cache(self, special: Special, chosen: int) -> None:
        candidate = special.candidates[chosen]
        medians_us = special.tuning.medians_us if special.tuning is not None else {}
        branch_us = {index: tuple(us) for index, us in special.branch_us.items()}
        entry = Entry(
            candidate=candidate.name,
            plan=str(candidate.plan),
            medians_us=medians_us,
            branch_us=branch_us,
            captures=special.captures,
        )
        plans.cache().store(special.key, entry)


def _is_lasting(failure: Exception) -> bool:
    """Whether what could not be captured never can be; memory and parameters that move are another run's affair."""
    return not lacks_memory(failure) and not isinstance(failure, NotShippable)


def _wants_same_bits() -> bool:
    """Whether the script asks for the same results each time, which what is chosen by time cannot promise."""
    return torch._C._get_cudnn_deterministic() or torch.are_deterministic_algorithms_enabled()


def describe(args: Sequence[Any]) -> str:
    """What people call a graph: the sizes of its inputs, parameters left out."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and not isinstance(arg, torch.nn.Parameter)]
    sizes = ["x".join(map(str, tensor.shape)) for tensor in tensors if tensor.dim() > 1 or len(tensors) == 1]
    mode = "training" if torch.is_grad_enabled() else "evaluation"
    return f"{mode} of {', '.join(dict.fromkeys(sizes[:3])) or 'a network'}"
