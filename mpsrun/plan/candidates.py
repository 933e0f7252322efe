"""The plans of a graph that are worth some training steps each."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mpsrun.graph.regions import Region
from mpsrun.plan.assign import hopeless, region_us, spread
from mpsrun.plan.cost import Costs
from mpsrun.plan.lanes import LEAD, is_stream, is_worker
from mpsrun.plan.plan import (
    BESIDE,
    CAPTURED,
    Assignment,
    Declined,
    Means,
    Plan,
    decide,
    immovable,
    left_with,
    some_shares,
)
from mpsrun.plan.shares import by_cost, worth_a_try

MAX_CANDIDATES = 7
# More than the 8 hardware queues of a process (CUDA_DEVICE_MAX_CONNECTIONS), to which captured graphs are not bound: of
# 8 branches on 7 side streams one waits for another.
SIDE_STREAMS = tuple(-i for i in range(1, 17))
SERIAL = "serial"
# A worker whose work beside a branch takes more of the branch's time than this is no help to a region inside of it.
BUSY_PART = 0.25
GOES_ALONG = "goes along with branch"  # why a region inside of a branch is not planned, whose branch left

_Choice = Assignment | Declined
_Chooser = Callable[[Region, Collection[int]], _Choice]  # the second are lanes that others keep busy meanwhile


@dataclass(frozen=True)
class Candidate:
    """A plan to try; predicted_us: microseconds of all regions together, forward and backward."""

    name: str
    plan: Plan
    predicted_us: float


def candidates(
    regions: Sequence[Region], worker_ids: Sequence[int], costs: Costs, means: Means
) -> tuple[Candidate, ...]:
    """At most `MAX_CANDIDATES` plans that differ, and what the user asked for beyond them; the best predicted first.

    regions: all of a graph, parents before children. worker_ids: the lanes of the workers that may be used. Always in:
    serial; side streams, if the device has them, or both captured, if that can be, the latter also with channels last,
    and each of these two with weight gradients beside; the plan that hands every region to all workers that is not
    hopeless. Asked for: captured streams with tuned convolutions; compiled branches, in the plan of workers that is
    predicted to be the fastest.
    """
    planner = _Planner(regions, worker_ids, costs)
    wanted = [planner.candidate(SERIAL, lambda _region, _busy: Declined("serial"))]
    if means.streams and not means.captures:  # captured they are never slower, and become these where a recording fails
        wanted.append(planner.candidate("streams", planner.on_streams))
    wanted.append(planner.candidate(f"workers, {len(worker_ids) + 1} lanes", planner.on_every_worker))
    if means.captures:
        replayed = _Planner(regions, (), costs.captured())
        wanted.append(_captured(replayed.candidate(CAPTURED, lambda _region, _busy: Declined("captured as it is"))))
        if means.streams:
            wanted.append(forced_captured(regions, costs))
        usual = [wanted[-1], with_channels_last(wanted[-1])] if means.turns else [wanted[-1]]
        wanted += usual[1:]
        wanted += map(with_gradients_beside, usual if means.beside else ())
    optional = planner.worker_candidates()
    if means.streams:
        optional.append(planner.candidate("mixed", planner.fastest))
    if means.captures_workers and worker_ids:
        optional.append(forced_captured_workers(regions, worker_ids, costs))
    if means.shares:
        optional += [shared for plain in wanted if (shared := _with_shares(plain, regions, costs)) is not None]
    found = _best(_different(wanted), optional)
    asked = [_tuned(forced_captured(regions, costs))] if means.tunes and means.captures and means.streams else []
    asked += [compiled(candidate) for candidate in found if candidate.plan.workers and means.compiles][:1]
    return tuple(sorted(_different([*found, *asked]), key=lambda candidate: candidate.predicted_us))


def forced(regions: Sequence[Region], worker_ids: Sequence[int], costs: Costs) -> Candidate:
    """Every region to the workers that has a branch which may leave, whether that pays or not."""
    planner = _Planner(regions, worker_ids, costs)
    return planner.candidate("workers, forced", planner.forced)


def forced_streams(regions: Sequence[Region], costs: Costs) -> Candidate:
    """Every region to side streams that has a branch which may leave, whether that pays or not."""
    planner = _Planner(regions, (), costs)
    return planner.candidate("streams, forced", planner.on_streams)


def forced_captured(regions: Sequence[Region], costs: Costs) -> Candidate:
    """As `forced_streams`, the whole graph captured."""
    planner = _Planner(regions, (), costs.captured())
    return _captured(planner.candidate("captured streams", planner.on_streams))


def forced_captured_workers(regions: Sequence[Region], worker_ids: Sequence[int], costs: Costs) -> Candidate:
    """As `forced`, the whole graph captured, in the lead and in the workers."""
    planner = _Planner(regions, worker_ids, costs.captured())
    return _captured(planner.candidate("captured workers", planner.forced))


def _captured(candidate: Candidate) -> Candidate:
    return replace(candidate, plan=replace(candidate.plan, captured=True))


def _with_shares(candidate: Candidate, regions: Sequence[Region], costs: Costs) -> Candidate | None:
    """The same with a share of the device for every lane of the regions where that may help; None where there is none.

    Not of side streams whose ops are launched one by one, since their kernels hardly meet; nor of every variation of a
    plan.
    """
    plan, whole = candidate.plan, costs.captured()  # what a GPU has to do, whoever launches it
    if plan.channels_last or plan.beside or (plan.streams and not plan.captured):
        return None
    chosen = dict(plan.regions)
    for region in regions:
        choice = chosen[region.index]
        if isinstance(choice, Assignment) and worth_a_try(region, choice.lanes, whole):
            chosen[region.index] = replace(choice, shares=some_shares(by_cost(region, choice.lanes, whole)))
    shared = replace(plan, regions=chosen)
    if not shared.has_shares:
        return None
    return Candidate(
        f"{candidate.name}, shares", shared, predicted_us(shared, regions, whole if plan.captured else costs)
    )


def compiled(candidate: Candidate) -> Candidate:
    """The same with its workers' branches compiled; predicted as before, since what that changes is not known."""
    return replace(candidate, name=f"{candidate.name}, compiled", plan=replace(candidate.plan, compiled=True))


def with_channels_last(candidate: Candidate) -> Candidate:
    """The same with the channels of images last; predicted as before, since what that changes is not known."""
    return replace(candidate, name=f"{candidate.name}, channels last", plan=replace(candidate.plan, channels_last=True))


def with_gradients_beside(candidate: Candidate) -> Candidate:
    """The same with weight gradients beside; predicted as before, since what that changes is not known."""
    return replace(candidate, name=f"{candidate.name}, {BESIDE}", plan=replace(candidate.plan, beside=True))


def _tuned(candidate: Candidate) -> Candidate:
    return replace(candidate, name=f"{candidate.name}, tuned", plan=replace(candidate.plan, tuned=True))


def predicted_us(plan: Plan, regions: Sequence[Region], costs: Costs) -> float:
    """Microseconds of all regions under `plan`; what an inner region saves shortens the branch around it."""
    saved_us: dict[int, dict[int, float]] = {}
    total_us = 0.0
    for region in reversed(regions):
        choice = plan.regions[region.index]
        shares = choice.shares if isinstance(choice, Assignment) else ()
        us = region_us(region, _lanes(choice, region), costs, saved_us.get(region.index), shares)
        if region.parent is None:
            total_us += us
        else:
            index, branch = region.parent
            inside = saved_us.setdefault(index, {})
            inside[branch] = inside.get(branch, 0.0) + costs.serial_us(region) - us
    return total_us


def nesting_of(regions: Sequence[Region]) -> Mapping[int, list[int]]:
    """By region index, the branches that have regions of their own inside."""
    inner = {region.parent for region in regions}
    return {
        region.index: [branch for branch in range(len(region.branches)) if (region.index, branch) in inner]
        for region in regions
    }


class _Planner:
    """Makes candidates from a choice for each region."""

    def __init__(self, regions: Sequence[Region], worker_ids: Sequence[int], costs: Costs) -> None:
        self._regions, self._workers, self._costs = regions, worker_ids, costs
        self._by_index = {region.index: region for region in regions}
        self._nesting = nesting_of(regions)

    def candidate(self, name: str, choose: _Chooser) -> Candidate:
        """Outer regions choose first; a branch that leaves takes its inner regions along, others take what is free."""
        made: dict[int, _Choice] = {}
        for region in self._regions:
            around = left_with(region, Plan(made), self._by_index)
            if around is None:
                made[region.index] = choose(region, self._busy(region, made))
            else:
                made[region.index] = Declined(f"{GOES_ALONG} {around[1]} of region {around[0]}")
        plan = Plan(made)
        return Candidate(name, plan, predicted_us(plan, self._regions, self._costs))

    def _busy(self, region: Region, made: Mapping[int, _Choice]) -> set[int]:
        """The lanes that other branches of the regions around this one keep busy: they take one thing after another."""
        found: set[int] = set()
        while region.parent is not None:
            index, inside = region.parent
            region, choice = self._by_index[index], made[index]
            if isinstance(choice, Assignment):
                duration_us = self._costs.branch_us(region)
                load_us: dict[int, float] = {}
                for lane, us in zip(choice.lanes, duration_us, strict=True):
                    load_us[lane] = load_us.get(lane, 0.0) + us
                limit_us = BUSY_PART * duration_us[inside]
                found |= {
                    lane for lane, us in load_us.items() if is_stream(lane) or (is_worker(lane) and us > limit_us)
                }
        return found

    def worker_candidates(self) -> list[Candidate]:
        """With 2, 3, ... lanes, each region only where that pays; then variants with all lanes."""
        if not self._workers:
            return []
        every = f"workers, {len(self._workers) + 1} lanes"
        return [
            *(
                self.candidate(f"workers, {n + 1} lanes", self._paying(self._workers[:n]))
                for n in range(1, len(self._workers))
            ),
            self.candidate(f"{every}, where it pays", self._paying(self._workers)),
            self.candidate(f"{every}, lead kept free", self._lead_free),
            self.candidate(f"{every}, inner regions", self._innermost),
        ]

    def on_streams(self, region: Region, busy: Collection[int]) -> _Choice:
        """Every branch that may leave on a side stream, so that none follows another.

        Autograd has the main stream wait for a branch's gradients as soon as they are submitted: the backward of a
        branch on the main stream, which comes last, would follow that of the others.
        """
        reason = immovable(region)
        if reason is not None:
            return Declined(reason)
        side = [lane for lane in SIDE_STREAMS if lane not in busy][: len(region.branches)]
        if not side:
            return Declined("all side streams are busy beside it")
        return Assignment(spread(region, side, self._costs, self._nesting[region.index], lead_share=False))

    def on_every_worker(self, region: Region, busy: Collection[int]) -> _Choice:
        reason = hopeless(region, self._costs)
        if reason is not None:
            return Declined(reason)
        return self._decide(region, self._workers, busy, True)

    def forced(self, region: Region, busy: Collection[int]) -> _Choice:
        """On workers that are busy, too, where there are no others."""
        return self._decide(region, self._workers, () if {*self._workers} <= {*busy} else busy, True)

    def _decide(self, region: Region, workers: Sequence[int], busy: Collection[int], forced: bool) -> _Choice:
        free = [worker for worker in workers if worker not in busy]
        if workers and not free:
            return Declined("the workers are busy with what runs beside it")
        return decide(region, free, self._costs, forced, self._nesting[region.index])

    def fastest(self, region: Region, busy: Collection[int]) -> _Choice:
        """Serial, streams or workers, whichever is predicted to be the fastest for this region."""
        choices = [Declined("serial is predicted to be the fastest"), self.on_streams(region, busy)]
        choices.append(self._decide(region, self._workers, busy, False))
        return min(choices, key=lambda choice: region_us(region, _lanes(choice, region), self._costs))

    def _paying(self, workers: Sequence[int]) -> _Chooser:
        return lambda region, busy: self._decide(region, workers, busy, False)

    def _lead_free(self, region: Region, busy: Collection[int]) -> _Choice:
        """As with all lanes, but where that is predicted to be no slower the lead keeps nothing."""
        usual = self._decide(region, self._workers, busy, False)
        free = [worker for worker in self._workers if worker not in busy]
        if not free or immovable(region) is not None or hopeless(region, self._costs) is not None:
            return usual
        lanes = spread(region, free, self._costs, self._nesting[region.index], lead_share=False)
        now_us = region_us(region, _lanes(usual, region), self._costs)
        return Assignment(lanes) if region_us(region, lanes, self._costs) <= now_us else usual

    def _innermost(self, region: Region, busy: Collection[int]) -> _Choice:
        if self._nesting[region.index]:
            return Declined("its inner regions go to the workers instead")
        return self._decide(region, self._workers, busy, False)


def _lanes(choice: _Choice, region: Region) -> tuple[int, ...]:
    return choice.lanes if isinstance(choice, Assignment) else (LEAD,) * len(region.branches)


def _different(made: Sequence[Candidate]) -> list[Candidate]:
    """The first of those that put every branch on the same lane, and do the same there."""
    seen: dict[tuple[object, ...], Candidate] = {}
    for candidate in made:
        assigned = sorted(
            (index, choice)
            for index, choice in candidate.plan.regions.items()
            if isinstance(choice, Assignment) and any(choice.lanes)
        )
        plan = candidate.plan
        marks = plan.captured, plan.compiled, plan.channels_last, plan.beside, plan.tuned and bool(assigned)
        key = *marks, tuple(assigned)
        seen.setdefault(key, candidate)
    return list(seen.values())


def _best(wanted: Sequence[Candidate], optional: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """All that are wanted, and of the others the best predicted, as far as there is room."""
    others = _different([*wanted, *sorted(optional, key=lambda candidate: candidate.predicted_us)])[len(wanted) :]
    chosen = [*wanted, *others[: MAX_CANDIDATES - len(wanted)]]
    return tuple(sorted(chosen, key=lambda candidate: candidate.predicted_us))
