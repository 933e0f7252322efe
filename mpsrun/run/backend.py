"""The `torch.compile` backend: from Dynamo's graph to a function that uses the lanes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpsrun import config, log
from mpsrun.errors import NotShippable
from mpsrun.graph.effects import Effects, analyze, drop_inert
from mpsrun.graph.regions import Region, find_regions
from mpsrun.launch.pulse import answer_questions
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.plan.plan import Declined, decide
from mpsrun.run import plans, report, session
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.examine import Analysis
from mpsrun.run.eyes import eyes
from mpsrun.run.observe import Observer, must_be_plain, needed_nodes
from mpsrun.run.options import Options
from mpsrun.run.overlaps import Overlaps
from mpsrun.run.sizes import sizes_of
from mpsrun.run.special import Planner, Special
from mpsrun.run.tuning import Tuning
from mpsrun.run.variant import Maker, Variant
from mpsrun.run.verify import Verification

MOST_MISSES = 16  # calls in a row with sizes of their own, after which nothing more is prepared
MOST_SPECIALS = 64  # sets of sizes of one graph that are kept prepared


@dataclass
class Calls:
    """How many calls there were so far of all graphs that may use lanes, and the graph of the last one.

    An attribute of `Graph` would do, but to set one in each call voids what Python has cached of the class.
    """

    entered: int = 0
    last: report.Graph | None = None


calls = Calls()


def mpsrun(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001 - what a backend is called with
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile(model, backend="mpsrun", options={"lanes": "workers"})`.

    options: `lanes` ("auto", "serial", "streams", "captured", "workers", "captured-workers") and `workers` (use at
    most so many) for this model; the default is the launcher's. Raises `MpsrunError` for an option that does not exist.
    """
    graph = Graph(gm, Options.read(options or {}, mode))
    report.graphs.append(graph.summary)
    if config.current().explain:
        from mpsrun.run import explain

        return explain.watched(gm, graph)
    return gm.forward if graph.is_plain else graph


class Graph:
    """One graph of Dynamo's, and what became of it.

    The first call for a set of sizes runs plain and takes notes; from them the workers are prepared. analysis: what was
    found in it, if it could be analysed.
    """

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self._gm = gm
        self._options = options
        self._misses = 0
        self._rested = False
        self._failures: dict[tuple[Any, ...], Exception | None] = {}
        self._specials: dict[tuple[Any, ...], Special] = {}
        self.summary = report.Graph()
        self.analysis: Analysis | None = None
        self._coordinator: Coordinator | None = None
        self._kind = ""
        self._maker: Maker | None = None
        self._verification: Verification | None = None
        if options.lanes != "serial":
            try:
                self._look(gm)
            except Exception as error:  # noqa: BLE001 - see _give_up
                self._give_up(error)
        self.summary.plain = self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether nothing of this graph will ever use a lane."""
        return self._maker is None

    @property
    def first(self) -> Special | None:
        """What it became for the sizes and modes of its first call, if it may use lanes."""
        return next(iter(self._specials.values()), None)

    def _look(self, gm: fx.GraphModule) -> None:
        drop_inert(gm)
        self._effects: Effects = analyze(gm)
        found = find_regions(gm, self._effects)
        for refusal in found.refusals:
            self.summary.refuse(refusal.reason, refusal.where)
        self._regions = found.regions
        for branch in (branch for region in found.regions for branch in region.branches if branch.pinned):
            self.summary.note(f"a branch stays in the lead: {branch.pinned}")
        if not found.regions:
            self.analysis = Analysis(gm, self._effects, found, "", None)
            if not found.refusals:
                self.summary.note("no branches that do not depend on each other")
            return
        self._overlaps = Overlaps(gm, self._effects)
        self._sizes = sizes_of(gm, self._effects, needed_nodes(found.regions))
        self._kind = device_kind(self._regions, self._effects)
        if self._kind not in MACHINES:
            self.analysis = Analysis(gm, self._effects, found, self._kind, None)
            self.summary.note(f"no lanes on the device {self._kind}")
            return
        self._planner = Planner(gm, self._effects, self._regions, self._kind, self._options, self.summary)
        self.analysis = Analysis(gm, self._effects, found, self._kind, self._planner)
        if self._is_worth_a_try():
            self._open_lanes()

    def _is_worth_a_try(self) -> bool:
        """Whether there is a plan that is not serial, were all workers there."""
        if plans.pins() is not None:
            return True
        workers = range(1, session.worker_count() + 1)
        if not all(candidate.plan.is_serial for candidate in self._planner.candidates(workers)):
            return True
        for region in self._regions:
            choice = decide(region, workers, Costs(MACHINES[self._kind]), self._options.forced)
            if isinstance(choice, Declined):
                self.summary.decline(region, choice.reason)
        return False

    def _open_lanes(self) -> None:
        if self._options.lanes not in ("streams", "captured"):
            self._coordinator = session.coordinator(self._kind)
            if self._coordinator is None:
                self.summary.note(session.why_none())
        if self._coordinator is None:
            if not self._planner.has_streams:
                return
            report.tell_at_exit()
            answer_questions(config.current())
        if config.current().trace is not None:
            eyes(self._kind)  # also where nothing is tuned
        if not self._options.forced and eyes(self._kind).has_monitor:
            mine = weakref.WeakMethod(self._rests)  # all summaries are kept
            self.summary.rests = lambda: (rests := mine()) is None or rests()
        self._maker = Maker(
            self._gm,
            self._effects,
            self._regions,
            self._coordinator,
            self._planner.subject,
            self.summary,
            lambda: self._planner.channels_last,
        )
        if config.current().verify:
            self._verification = Verification.of(self._gm, self._effects, self._kind)

    # ---- calls

    def __call__(self, *args: Any) -> Any:
        calls.entered += 1
        calls.last = self.summary
        owner, maker = self._coordinator, self._maker
        if maker is None or (owner is not None and owner.closed) or must_be_plain(self._kind):
            return self._gm.forward(*args)
        if self._kind == "cuda":
            # Backward comes in this thread then, not in autograd's own, for which each node is in another core's cache.
            torch.autograd.set_multithreading_enabled(False)
        if self._overlaps.now(args):
            return self._gm.forward(*args)
        key = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(args[i] for i in self._sizes))
        if owner is not None:
            owner.admit()
        special = self._specials.get(key)
        if special is None or (special.tuning is None and special.epoch != self._epoch):
            self._misses += 1
            return self._first(maker, key, args) if self._misses <= MOST_MISSES else self._gm.forward(*args)
        self._misses = 0
        try:
            variant = self._choose(maker, special, args)
        except Exception as error:  # noqa: BLE001 - see _give_up
            self._give_up(error)
            variant = None
        result = self._gm.forward(*args) if variant is None or variant.is_plain else self._on_lanes(variant, args)
        if special.tuning is not None:
            special.tuning.called(result)
            if variant is not None and variant.failure is not None and not special.tuning.is_decided:
                self._do_without(variant, special, special.tuning, key)
        return result

    def _do_without(self, variant: Variant, special: Special, tuning: Tuning, key: tuple[Any, ...]) -> None:
        """A plan that is being tried cannot be captured: try the others, or plan anew where none is captured.

        One that was decided on before goes on with its streams.
        """
        failed = {i for i, made in special.variants.items() if made.failure is not None}
        if any(c.plan.captured and i not in failed for i, c in enumerate(special.candidates)):
            for i in failed:
                tuning.not_captured(i)
        elif self._specials.pop(key, None) is special:
            self._failures[key] = variant.failure
            self.summary.undecided.discard(special.description)
            special.variants.clear()  # with their recordings, which would else wait for the garbage collector
            special.tuning = None

    def _on_lanes(self, variant: Variant, args: tuple[Any, ...]) -> Any:
        try:
            if self._coordinator is not None and variant.strands:
                self._coordinator.enter()
                variant.binding.follow(args)
        except NotShippable as error:  # memory that no worker can see
            log.detail(f"a network runs in the lead: {error}")
            return self._gm.forward(*args)
        self.summary.called(variant.reports)
        return self._run(variant, args)

    @property
    def _epoch(self) -> int:
        return self._coordinator.epoch if self._coordinator is not None else 0

    def _run(self, variant: Variant, args: tuple[Any, ...]) -> Any:
        verification = self._verification
        if verification is None:
            return variant.run(*args)
        if variant.verified == verification.steps:
            verification.settle()
            return variant.run(*args)
        variant.verified += 1
        return verification.call(variant.run, args, variant.verified)

    def _choose(self, maker: Maker, special: Special, args: tuple[Any, ...]) -> Variant | None:
        """What this call runs under; None for plain PyTorch."""
        tuning, chosen = special.tuning, 0
        if tuning is not None:
            if not tuning.is_decided and not self._may_tune(maker, special, tuning, args):
                tuning.pause()
                return None
            if tuning.wants_candidates and self._may_tune(maker, special, tuning, args):
                tuning.prepared()
            chosen = tuning.step(calls.entered, self._lost())
        if special.candidates[chosen].plan.is_serial:
            return None
        variant = special.variants.get(chosen)
        if variant is None:
            variant = special.variants[chosen] = maker.make(special.candidates[chosen].plan, special.seen, args)
        variant.tend(args)
        return variant if variant.is_ready() else None

    def _may_tune(self, maker: Maker, special: Special, tuning: Tuning, args: tuple[Any, ...]) -> bool:
        """Whether it is this one's turn and every candidate can run; in each call one more of them is made.

        While a worker is missing nothing is tuned.
        """
        if not tuning.may_start(calls.entered):
            return False
        for i, candidate in enumerate(special.candidates):
            if i not in special.variants and not candidate.plan.is_serial:
                special.variants[i] = maker.make(candidate.plan, special.seen, args)
                special.whole_under = None
                return False
        stirs = self._coordinator.stirs if self._coordinator is not None else ()
        if special.whole_under == stirs:
            return True
        for i, variant in special.variants.items():
            variant.tend(args)
            if variant.lacks_memory:
                tuning.no_memory(i)
        if all(v.is_ready() and v.is_whole() for v in special.variants.values()):
            special.whole_under = stirs
            return True
        return tuning.is_decided

    def _rests(self) -> bool:
        """Look at the load; whether all calls may be plain while it stays."""
        if must_be_plain(self._kind):
            return self._rested
        tunings = [special.tuning for special in [*self._specials.values()] if special.tuning is not None]
        try:
            for tuning in tunings:
                tuning.tend()
        except Exception as error:  # noqa: BLE001 - see _give_up
            self._give_up(error)
            return True
        self._rested = any(t.is_plain for t in tunings) and not any(t.needs_calls for t in tunings)
        if self._rested:
            for tuning in tunings:
                tuning.pause()
        return self._rested

    def _lost(self) -> list[int]:
        """The workers that nobody will take the places of."""
        return [link.index for link in self._coordinator.links if link.is_last] if self._coordinator is not None else []

    # ---- the first call for a set of sizes and modes

    def _first(self, maker: Maker, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        observer = Observer(self._gm, self._effects, self._regions)
        result = observer.run(*args)
        while len(self._specials) >= MOST_SPECIALS:
            del self._specials[next(iter(self._specials))]
        try:
            special = self._specials[key] = self._planner.special(
                self._coordinator, args, observer.observation, self._failures.get(key)
            )
            if special.tuning is None:
                self._make_now(maker, special, args)
        except Exception as error:  # noqa: BLE001 - see _give_up
            self._give_up(error)
        return result

    def _give_up(self, error: Exception) -> None:
        """A network that cannot be planned for still trains."""
        if config.current().strict:
            raise error
        self._maker = None
        self.summary.plain, self.summary.rests = True, None
        log.say(f"a network could not be planned for, it runs in the lead ({type(error).__name__}: {error})")

    def _make_now(self, maker: Maker, special: Special, args: tuple[Any, ...]) -> None:
        """Make the only variant, and wait for the workers: it is forced or pinned, so that runs are alike."""
        (candidate,) = special.candidates
        for region in self._regions:
            choice = candidate.plan.regions.get(region.index)
            if isinstance(choice, Declined):
                self.summary.decline(region, choice.reason)
        variant = special.variants[0] = maker.make(candidate.plan, special.seen, args)
        plans.keep(plans.fingerprint(special.key), special.description, candidate.plan)
        owner = self._coordinator
        if owner is not None and not owner.setup.wait_ready(variant.crossings):
            log.say("the workers did not get ready in time; the network runs in the lead until they are")


def device_kind(regions: Sequence[Region], effects: Effects) -> str:
    """The type of the device that all branches compute on, or a text that names none."""
    devices = {
        facts.device.type
        for region in regions
        for branch in region.branches
        for node in branch.nodes
        if (facts := effects.facts[node]).device is not None and not facts.floating
    }
    return devices.pop() if len(devices) == 1 else "mixed: " + ", ".join(sorted(devices))
