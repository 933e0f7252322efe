"""`mpsrun.explain` and `mpsrun explain`: networks are looked at when they are called, and told about afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpsrun import config, log
from mpsrun.graph.effects import analyze, drop_inert
from mpsrun.graph.regions import find_regions
from mpsrun.plan.cost import MACHINES
from mpsrun.run import plainrun, plans, report, session
from mpsrun.run.alone import caller
from mpsrun.run.backend import Graph, device_kind
from mpsrun.run.examine import Analysis, Network, examine
from mpsrun.run.explain_parts import Chosen, explained, together
from mpsrun.run.explanation import Explanation
from mpsrun.run.options import Options
from mpsrun.run.plainrun import PlainRun
from mpsrun.run.special import Planner, Special

_watched: list[Watched] = []


def explain(model: Callable[..., Any], inputs: Any) -> Explanation:
    """Regions, branches, their times alone and the plan for `model(*inputs)`, without workers or tuning.

    inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments. Grad mode, autocast and training mode
    count as they are. The model and the random generators are left as they were; what its forward does elsewhere is
    done once.
    """
    return together([watched.explanation(number) for number, watched in enumerate(_look(model, inputs))])


def networks(model: Callable[..., Any], inputs: Any) -> list[Network]:
    """What `explain` starts from: the graphs of `model(*inputs)` with the times of their branches alone."""
    return [watched.network for watched in _look(model, inputs) if watched.network is not None]


def _look(model: Callable[..., Any], inputs: Any) -> list[Watched]:
    model = getattr(model, "_orig_mod", model)  # of a `torch.compile`
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    kwargs = inputs if isinstance(inputs, Mapping) else {}
    found: list[Watched] = []

    def compiler(gm: fx.GraphModule, _example_inputs: Any) -> Callable[..., Any]:
        found.append(Watched(gm, _analysed(gm), None))
        return found[-1].only_look

    with _unchanged(model), torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(caller(model), backend=compiler)(*args, **kwargs)
    return found


def watched(gm: fx.GraphModule, graph: Graph) -> Callable[..., Any]:
    """What Dynamo gets in the place of a graph under `mpsrun explain`."""
    _watched.append(Watched(gm, graph.analysis, graph))
    return _watched[-1].look_and_run


def of_script() -> Explanation:
    """All networks that the script has called so far."""
    called = [watched for watched in _watched if watched.network is not None]
    return together([watched.explanation(number) for number, watched in enumerate(called)])


def stop_after(steps: int) -> None:
    """End the script with status 0 after so many steps of its optimizers."""
    count = itertools.count(1)

    def stepped(*_: Any) -> None:
        if next(count) == steps:
            log.say(f"stopped the script after {steps} steps of its optimizer; --steps N takes more or fewer")
            raise SystemExit(0)

    register_optimizer_step_post_hook(stepped)


class Watched:
    """A graph that is looked at when it is called for the first time.

    analysis: None where it could not be analysed. graph: what has lanes for it, None where it is only looked at.
    """

    network: Network | None = None

    def __init__(self, gm: fx.GraphModule, analysis: Analysis | None, graph: Graph | None) -> None:
        self._gm, self._analysis, self._graph = gm, analysis, graph
        self._looked = False

    def only_look(self, *args: Any) -> Any:
        """Look, and compute the outputs from copies of what the graph writes."""
        assert self._analysis is not None, "an analysis that fails raises, where there is no script to go on with"
        self.network = examine(self._analysis, args)
        return self._gm.forward(*PlainRun(self._gm, self._analysis.effects, self._analysis.kind).copy(args))

    def look_and_run(self, *args: Any) -> Any:
        """Look, and then have the graph called as ever, also where the look failed."""
        if not self._looked and self._analysis is not None:
            self._looked = True
            try:
                self.network = examine(self._analysis, args)
            except Exception as error:  # as for lack of memory
                if config.current().strict:
                    raise
                log.say(f"a network could not be explained ({type(error).__name__}: {error})")
        return self._graph(*args) if self._graph is not None else self._gm.forward(*args)

    def explanation(self, number: int) -> Explanation:
        """What to tell of this graph as network `number`."""
        assert self.network is not None, "only graphs that were called are told of"
        return explained(number, self.network, self._chosen(self.network), self._later_refusals(self.network))

    def _chosen(self, network: Network) -> Chosen | None:
        """The plan, and how it was found; None where there is nothing to plan."""
        special = self._graph.first if self._graph is not None else None
        if special is not None:
            return _chosen_of(special)
        if self._analysis is None or self._analysis.planner is None:
            return None
        workers = range(1, session.worker_count() + 1)
        return Chosen("estimated", self._analysis.planner.candidates(workers, network.costs.measured_us), 0, {})

    def _later_refusals(self, network: Network) -> list[str]:
        """What showed itself when regions were cut and lowered, or when workers were needed."""
        if self._graph is None:
            return []
        summary = self._graph.summary
        known = {*summary.declined, *(f"{r.where}: {r.reason}" if r.where else r.reason for r in network.refusals)}
        pinned = {branch.pinned for region in network.regions for branch in region.branches}
        known |= {f"a branch stays in the lead: {reason}" for reason in pinned}
        return [text for text in summary.refusals if text not in known]


def _chosen_of(special: Special) -> Chosen:
    tuning = special.tuning
    if tuning is None:
        name = special.candidates[0].name
        return Chosen("pinned" if name == "pinned" else "forced", special.candidates, 0, {})
    if tuning.decided is None:
        return Chosen("estimated", special.candidates, 0, tuning.medians_us)
    if tuning.medians_us:
        return Chosen("tuned", special.candidates, tuning.decided, tuning.medians_us)
    entry = plans.cache().load(special.key)
    return Chosen("cached", special.candidates, tuning.decided, entry.medians_us if entry is not None else {})


def _analysed(gm: fx.GraphModule) -> Analysis:
    drop_inert(gm)
    effects = analyze(gm)
    found = find_regions(gm, effects)
    kind = device_kind(found.regions, effects)
    options = Options.read({}, None)
    has_plan = kind in MACHINES and found.regions
    planner = Planner(gm, effects, found.regions, kind, options, report.Graph()) if has_plan else None
    return Analysis(gm, effects, found, kind, planner)


@contextmanager
def _unchanged(model: Callable[..., Any]) -> Iterator[None]:
    """Put back the generators, buffers, and what a forward sets on its modules."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(tensor, tensor.clone()) for _, own in buffers for tensor in own.values() if tensor is not None]
    before = plainrun.generators()
    try:
        yield
    finally:
        plainrun.set_generators(before)
        for now, then in (*attributes, *buffers):
            now.clear()
            now.update(then)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
