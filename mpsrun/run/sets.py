"""Any set of branches on lanes, without a graph for each set: every branch is compiled and sent by itself."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from mpsrun import config, log
from mpsrun.graph.regions import Region
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.plan.plan import Assignment, Declined, decide
from mpsrun.run import philox, report, session
from mpsrun.run.alone import Alone, Question
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.observe import must_be_plain
from mpsrun.run.part import Job, Part, Sent

MOST_DECLINED = 256  # sets of branches and sizes that are remembered as too small

Questions = list[Question]


class Sets:
    """The branches of one `Branches`, any of which can run together."""

    def __init__(self) -> None:
        self._summary = report.Graph()
        report.graphs.append(self._summary)
        self._alone: dict[int, Alone] = {}
        self._declined: dict[tuple[Any, ...], None] = {}

    def run(self, modules: Mapping[int, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The results of these branches, by their numbers, in this order."""
        key = tuple(modules), torch.is_grad_enabled(), *_shapes((args, kwargs))
        if len(modules) < 2 or config.current().lanes == "serial" or key in self._declined:
            return [module(*args, **kwargs) for module in modules.values()]
        asked = [self._compiled(number, module).ask(args, kwargs) for number, module in modules.items()]
        questions = [question for question in asked if isinstance(question, Question)]
        if len(questions) == len(asked) and not _depend(questions):
            coordinator = self._coordinator(questions, key)
            if coordinator is not None:
                return self._run(coordinator, questions)
        return [question.here() for question in asked]

    def _compiled(self, number: int, module: nn.Module) -> Alone:
        found = self._alone.get(number)
        if found is None or found.module is not module:  # the script may have put another one in its place
            found = Alone(module, _maker(str(number), self._summary), self._summary.note)
            self._alone[number] = found
        return found

    def _coordinator(self, questions: Questions, key: tuple[Any, ...]) -> Coordinator | None:
        """The coordinator, where this set may use lanes and it pays."""
        kinds = set[str]().union(*(question.part.kinds for question in questions))
        if len(kinds) != 1 or kinds.isdisjoint(MACHINES):
            return None
        (kind,) = kinds
        plan = _plan(questions, range(1, session.worker_count() + 1), kind)
        if isinstance(plan, Declined):
            self._summary.refuse(f"a set of {len(questions)} branches stays in the lead: {plan.reason}", None)
            while len(self._declined) >= MOST_DECLINED:
                del self._declined[next(iter(self._declined))]
            self._declined[key] = None
            return None
        coordinator = session.coordinator(kind)
        if coordinator is None:
            self._summary.note(session.why_none())
            return None
        return None if coordinator.closed or must_be_plain(kind) else coordinator

    def _run(self, coordinator: Coordinator, questions: Questions) -> list[Any]:
        """Workers start first, then the lead computes its own branches, then it takes what the workers have."""
        coordinator.admit()
        coordinator.enter()
        draws = [question.part.draws(coordinator, question.args) for question in questions]
        known = [draw for draw in draws if draw is not None]
        in_turn = len(known) < len(draws)  # where the random numbers of each start is known after this call
        jobs = [None] * len(questions) if in_turn else self._jobs(coordinator, questions)
        places = [] if in_turn else _places(known)
        sent: dict[int, Sent] = {}
        outputs: list[Any] = [None] * len(questions)
        for i, job in enumerate(jobs):
            if job is not None:
                _seek(places, i)
                sent[i] = questions[i].part.send(job, questions[i].args)
        for i, question in enumerate(questions):
            if i not in sent:
                _seek(places, i)
                outputs[i] = question.part.noted(coordinator, question.args)
        _seek(places, len(questions))
        for i, under_way in sent.items():
            outputs[i] = questions[i].part.take(under_way, questions[i].args)
        self._summary.calls += bool(sent)
        return [question.answered(found) for question, found in zip(questions, outputs, strict=True)]

    def _jobs(self, coordinator: Coordinator, questions: Questions) -> list[Job | None]:
        """By branch, its job in the worker that it goes to; None where it stays in the lead, or is not ready yet."""
        plan = _plan(questions, coordinator.present(), coordinator.device.kind)
        lanes = (0,) * len(questions) if isinstance(plan, Declined) else plan.lanes
        jobs = [
            q.part.job(coordinator, lane, q.args) if lane else None for q, lane in zip(questions, lanes, strict=True)
        ]
        crossings = [job.strand.crossing for job in jobs if job is not None]
        if _forced() and not coordinator.setup.wait_ready(crossings):
            log.say("the workers did not get ready in time; branches run in the lead until they are")
        return [job if job is not None and job.strand.crossing.is_ready() else None for job in jobs]


def _maker(label: str, summary: report.Graph) -> Callable[[fx.GraphModule], Part]:
    return lambda gm: Part(gm, label, summary)


def _forced() -> bool:
    return config.current().lanes in ("workers", "captured-workers")


def _plan(questions: Questions, workers: Sequence[int], kind: str) -> Assignment | Declined:
    region = Region(0, tuple(question.part.branch for question in questions))
    return decide(region, workers, Costs(MACHINES[kind]), _forced())


def _depend(questions: Questions) -> bool:
    """Whether a branch writes in place what another one uses, or over its own inputs: then their order counts."""
    users = Counter(storage for q in questions for storage in q.part.storages(q.args))
    shared = any(users[storage] > 1 for q in questions for storage in q.part.written(q.args))
    return shared or any(question.part.overlapping(question.args) for question in questions)


def _places(draws: Sequence[int]) -> list[int]:
    """Where each branch's random ops would start in plain PyTorch, and where the last ones would end."""
    return list(itertools.accumulate(draws, initial=philox.offset())) if any(draws) else []


def _seek(places: Sequence[int], index: int) -> None:
    if places:
        philox.generator().set_offset(places[index])


def _shapes(values: Any) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
