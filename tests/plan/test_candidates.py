"""Which plans are tried, what they are predicted to take, what they could give at best, and their memory."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import GPU, PATIENT, region

from mpsrun.graph.regions import Region
from mpsrun.plan.assign import hopeless
from mpsrun.plan.bound import Bound, bound
from mpsrun.plan.candidates import (
    MAX_CANDIDATES,
    Candidate,
    candidates,
    forced,
    forced_streams,
    nesting_of,
    predicted_us,
)
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.plan.memory import CONTEXT_BYTES, SHARE_BYTES, affordable, memory_needed_bytes, too_large, workspace_bytes
from mpsrun.plan.plan import Assignment, Declined, Means, Plan
from mpsrun.plan.planfile import fits
from mpsrun.plan.shares import places_of

COSTS = Costs(GPU)
NO = Declined("no")


def by_name(found: Sequence[Candidate]) -> dict[str, Candidate]:
    assert len({candidate.name for candidate in found}) == len(found)
    return {candidate.name: candidate for candidate in found}


def test_towers() -> None:
    found = by_name(candidates([region(100, 100, 100, 100)], [1, 2, 3], COSTS, Means(streams=True)))
    assert list(found) == ["workers, 4 lanes", "workers, 2 lanes", "workers, 3 lanes", "serial", "streams"]
    assert found["workers, 4 lanes"].plan == Plan({0: Assignment((0, 1, 2, 3))})
    assert found["workers, 4 lanes"].predicted_us == 3_000 + 300
    assert found["streams"].plan == Plan({0: Assignment((-1, -2, -3, -4))})
    assert found["serial"].plan.is_serial
    assert found["serial"].predicted_us == 12_000


def test_captured_workers_are_one_of_at_most_six() -> None:
    found = by_name(
        candidates([region(100, 100, 100, 100)], [1, 2, 3], COSTS, Means(True, True, captures_workers=True))
    )
    assert len(found) == MAX_CANDIDATES
    assert found["captured workers"].plan == Plan({0: Assignment((0, 1, 2, 3))}, captured=True)
    assert Plan.parse(str(found["captured workers"].plan)) == found["captured workers"].plan
    assert "captured workers" not in by_name(candidates([region(100, 100)], [1], COSTS, Means(True, captures=True)))
    assert "captured workers" not in by_name(candidates([region(100, 100)], [], COSTS, Means(True, True, True)))


def test_a_graph_that_can_be_captured_is_tried_with_and_without_streams() -> None:
    found = by_name(candidates([region(100, 100, 100, 100)], [], COSTS, Means(streams=True, captures=True)))
    assert found["captured"].plan == Plan({0: Declined("captured as it is")}, captured=True)
    assert found["captured streams"].plan == Plan({0: Assignment((-1, -2, -3, -4))}, captured=True)
    assert found["captured streams"].predicted_us < found["captured"].predicted_us < found["serial"].predicted_us
    assert [candidate.plan.is_serial for candidate in found.values()].count(True) == 1


def shared(*regions: Region, workers: Sequence[int] = (), captures: bool = True) -> dict[str, Plan]:
    """By name, the candidates with shares."""
    found = by_name(candidates(regions, workers, COSTS, Means(streams=True, captures=captures, shares=True)))
    assert len(found) <= MAX_CANDIDATES
    return {name: candidate.plan for name, candidate in found.items() if candidate.plan.has_shares}


def test_shares_follow_the_costs_of_branches_that_are_alike() -> None:
    """Together they are three times the GPU. Of the trunk nothing is said: it has the whole."""
    four, unlike, three = region(90, 90, 120, 90), region(3, 900, 3, 3, index=1), region(90, 90, 90, index=2)
    plans = shared(four, unlike, three, region(*[30] * 8, index=3))
    assert list(plans) == ["captured streams, shares"]
    plan = plans["captured streams, shares"]
    assert plan.captured
    assert plan.regions[0] == Assignment((-2, -3, -1, -4), (69, 69, 92, 69))
    assert plan.regions[1] == Assignment((-2, -1, -3, -4))
    assert plan.regions[2] == Assignment((-1, -2, -3))
    assert plan.regions[3] == Assignment(tuple(-i for i in range(1, 9)), (37,) * 8)


def test_kernels_that_fill_the_gpu_get_no_shares() -> None:
    assert shared(region(10, 10, 10, 10, flops=199_000_000)) != {}  # 20 us of the whole GPU each
    assert shared(region(10, 10, 10, 10, flops=200_000_000)) == {}
    assert shared(region(0, 0, 0, 0)) == {}


def test_workers_have_shares_where_nothing_can_be_captured() -> None:
    """The lead's own branch has the whole GPU."""
    plans = shared(region(100, 100, 120, 100), workers=[1, 2, 3], captures=False)
    assert plans["workers, 4 lanes, shares"].regions[0] == Assignment((0, 2, 1, 3), (100, 71, 85, 71))
    assert all(plan.workers for plan in plans.values())


def test_the_sixth_candidate_is_the_one_with_shares() -> None:
    found = candidates([region(100, 100, 100, 100)], [1, 2, 3], COSTS, Means(True, captures=True, shares=True))
    names = [candidate.name for candidate in found]
    assert names[:2] == ["captured streams", "captured streams, shares"]
    assert len(names) == MAX_CANDIDATES


@pytest.mark.parametrize("streams", [True, False])
def test_channels_come_last_in_a_captured_plan(streams: bool) -> None:
    towers = [region(100, 100, 100, 100)]
    means = Means(streams, captures=True, shares=True, tunes=True, turns=True)
    name = "captured streams" if streams else "captured"
    for workers in ([], [1, 2, 3]):
        found = by_name(candidates(towers, workers, COSTS, means))
        usual, last = found[name], found[f"{name}, channels last"]
        assert len(found) <= MAX_CANDIDATES + streams, "tuned, if there are branches beside each other"
        assert last == replace(usual, name=last.name, plan=replace(usual.plan, channels_last=True))
        assert [c for c in found.values() if c.plan.channels_last] == [last]
    assert not any(c.plan.channels_last for c in candidates(towers, [1], COSTS, Means(streams, turns=True)))


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("workers", [[], [1, 2, 3]])
def test_weights_have_their_gradients_beside_in_a_captured_plan(turns: bool, workers: list[int]) -> None:
    towers = [region(100, 100, 100, 100)]
    means = Means(True, captures=True, captures_workers=True, shares=True, tunes=True, turns=turns, beside=True)
    found = by_name(candidates(towers, workers, COSTS, means))
    assert len(found) <= MAX_CANDIDATES + 1
    assert found["captured streams, tuned"].plan.tuned, "the user has asked for it"
    names = ["captured streams", *["captured streams, channels last"][: int(turns)]]
    for name in names:
        usual, apart = found[name], found[f"{name}, weight gradients beside"]
        assert apart == replace(usual, name=apart.name, plan=replace(usual.plan, beside=True))
    assert len([c for c in found.values() if c.plan.beside]) == len(names)
    assert not any(c.plan.beside for c in candidates(towers, workers, COSTS, replace(means, captures=False)))


def test_convolutions_are_tuned_where_cudnn_may_choose() -> None:
    towers = [region(100, 100, 100, 100)]
    means = Means(True, captures=True, shares=True)
    usual = candidates(towers, [1, 2, 3], COSTS, means)
    found = by_name(candidates(towers, [1, 2, 3], COSTS, replace(means, tunes=True)))
    assert [c for c in found.values() if not c.plan.tuned] == [*usual], (
        "what the user asks for takes no place of others"
    )
    assert len(found) == len(usual) + 1 == MAX_CANDIDATES + 1
    plain, tuned = found["captured streams"].plan, found["captured streams, tuned"].plan
    assert (tuned.tuned, replace(tuned, tuned=False)) == (True, plain)
    assert found["captured streams, shares"].plan.has_shares
    assert str(tuned).startswith("captured\nconvolutions tuned\nregion 0: stream 1 |")
    assert not any(c.plan.tuned for c in candidates(towers, [1], COSTS, Means(True, captures=False, tunes=True)))
    nothing = candidates([region(9, 9, pinned=(0, 1))], [], COSTS, Means(True, captures=True, tunes=True))
    assert not any(candidate.plan.tuned for candidate in nothing)


@pytest.mark.parametrize("captures", [False, True])
def test_branches_are_compiled_where_that_is_asked_for(captures: bool) -> None:
    """In one plan more than there would be: the best of those with workers."""
    towers = [region(5000, 5000, 5000, 5000)]
    usual = candidates(towers, [1, 2, 3], COSTS, Means(True, captures=captures, captures_workers=captures))
    found = candidates(
        towers, [1, 2, 3], COSTS, Means(True, captures=captures, captures_workers=captures, compiles=True)
    )
    (made,) = [candidate for candidate in found if candidate.plan.compiled]
    assert [candidate for candidate in found if candidate is not made] == [*usual]
    best = next(candidate for candidate in usual if candidate.plan.workers)
    assert (made.name, made.plan) == (f"{best.name}, compiled", replace(best.plan, compiled=True))
    assert [*found] == sorted(found, key=lambda candidate: candidate.predicted_us)
    alone = candidates(towers, [], COSTS, Means(True, compiles=True))
    assert not any(candidate.plan.compiled for candidate in alone)


def test_an_algorithm_may_take_its_lane_s_part_of_what_is_free() -> None:
    regions = [region(100, 100, 100, moved_bytes=4000)]
    plan = Plan({0: Assignment((-1, -2, -2))}, captured=True)
    assert workspace_bytes(plan, regions, 2 * 3000 + 6000) == 2000
    assert workspace_bytes(plan, regions, 5000) == 0


def test_work_takes_longer_on_a_share() -> None:
    work = region(1, 1, flops=10**9)  # 3 ms of the whole GPU each
    plain, narrow = (Plan({0: Assignment((-1, -2), shares)}, captured=True) for shares in ((), (50, 20)))
    assert predicted_us(plain, [work], COSTS.captured()) == 6_000
    assert predicted_us(narrow, [work], COSTS.captured()) == 15_000


def test_shares_are_placed_one_behind_the_other() -> None:
    assert places_of(Assignment((0, -1, -2))) == {}
    assert places_of(Assignment((0, -2, -1, -2), (100, 30, 50, 30))) == {-2: (0, 30), -1: (30, 50)}
    assert places_of(Assignment((-1, -2, -3), (60, 60, 100))) == {-1: (0, 60), -2: (60, 60)}


def test_small_regions_are_declined_where_it_must_pay_and_tried_where_there_is_hope() -> None:
    regions = [region(100, 100), region(9, 9, index=1), region(1, 1, index=2)]
    found = by_name(candidates(regions, [1], COSTS, Means()))
    assert list(found) == ["workers, 2 lanes, where it pays", "workers, 2 lanes", "serial"]
    paying, every = found["workers, 2 lanes, where it pays"].plan, found["workers, 2 lanes"].plan
    assert [isinstance(paying.regions[i], Assignment) for i in range(3)] == [True, False, False]
    assert [isinstance(every.regions[i], Assignment) for i in range(3)] == [True, True, False]


def test_regions_choose_their_kind_of_lane_in_the_mixed_plan() -> None:
    overlapping = Costs(GPU, {0: (900.0, 900.0), 1: (9_000.0, 9_000.0)})
    regions = [region(1, 1), region(300, 300, index=1), region(1, 1, index=2)]
    mixed = by_name(candidates(regions, [1], overlapping, Means(streams=True)))["mixed"].plan
    assert mixed.regions[0] == Assignment((-1, -2))
    assert mixed.regions[1] == Assignment((0, 1))
    assert isinstance(mixed.regions[2], Declined)


def test_the_lead_is_kept_free_where_that_is_no_slower() -> None:
    name = "workers, 4 lanes, lead kept free"
    assert name not in by_name(candidates([region(90, 90, 90, 90)], [1, 2, 3], COSTS, Means()))
    found = by_name(candidates([region(9, 9, 9)], [1, 2, 3], COSTS, Means()))
    assert found[name].plan == Plan({0: Assignment((1, 2, 3))})
    assert found["workers, 4 lanes"].plan == Plan({0: Assignment((0, 1, 2))})


def test_the_lead_is_free_where_each_branch_has_a_worker() -> None:
    found = by_name(candidates([region(90, 90, 90)], [1, 2, 3], COSTS, Means()))
    assert found["workers, 4 lanes"].plan == Plan({0: Assignment((1, 2, 3))})


NESTED = [region(40, 400), region(130, 130, 130, index=1, parent=(0, 1)), region(3, 3, index=2, parent=(1, 0))]


def test_a_branch_that_leaves_takes_its_inner_regions_along() -> None:
    towers = [region(200, 200), region(100, 100, index=1, parent=(0, 0)), region(100, 100, index=2, parent=(0, 1))]
    found = by_name(candidates(towers, [1], COSTS, Means()))
    outer, inner = found["workers, 2 lanes"].plan, found["workers, 2 lanes, inner regions"].plan
    assert outer.regions == {
        0: Assignment((0, 1)),
        1: Declined("the workers are busy with what runs beside it"),
        2: Declined("goes along with branch 1 of region 0"),
    }
    assert isinstance(inner.regions[0], Declined)
    assert [inner.regions[i] for i in (1, 2)] == [Assignment((0, 1))] * 2


def test_inner_regions_take_the_lanes_that_are_free() -> None:
    """A worker takes one thing after another: behind the other tower an inner region would wait for all of it."""
    towers = [region(200, 200), region(100, 100, index=1, parent=(0, 0)), region(20, 80, index=2, parent=(1, 1))]
    assert forced(towers, [1, 2, 3], COSTS).plan.regions == {
        0: Assignment((0, 1)),
        1: Assignment((0, 2)),
        2: Declined("goes along with branch 1 of region 1"),
    }
    deep = [*towers[:2], region(40, 60, index=2, parent=(1, 0))]
    assert forced(deep, [1, 2, 3], COSTS).plan.regions[2] == Assignment((0, 3))
    assert forced(deep, [1, 2], COSTS).plan.regions[2] == Assignment((2, 1))  # there is no other, and it is forced


def test_inner_regions_share_a_worker_with_an_early_head() -> None:
    """It is soon done with that, beside most of the network."""
    regions = [region(40, 400), region(130, 130, index=1, parent=(0, 1)), region(9, 9, index=2, parent=(0, 1))]
    assert forced(regions, [1], COSTS).plan.regions == {
        0: Assignment((1, 0)),
        1: Assignment((0, 1)),
        2: Assignment((0, 1)),
    }


def test_inner_regions_take_side_streams_of_their_own() -> None:
    regions = [region(40, 400), region(130, 130, index=1, parent=(0, 1))]
    assert forced_streams(regions, COSTS).plan.regions == {0: Assignment((-1, 0)), 1: Assignment((-2, -3))}


def test_prediction_counts_inner_regions_inside_their_branch() -> None:
    plan = Plan({0: Assignment((1, 0)), 1: Assignment((0, 1, 2)), 2: NO})
    inner = 130 * 30 + 300
    rest = 400 * 30 - 3 * 130 * 30 + inner
    assert predicted_us(plan, NESTED, COSTS) == rest + 300
    assert predicted_us(Plan({0: NO, 1: NO, 2: NO}), NESTED, COSTS) == 440 * 30


def test_without_anything_to_try_serial_is_left() -> None:
    assert [c.name for c in candidates([], [1], COSTS, Means(streams=True))] == ["serial"]
    assert [c.name for c in candidates([region(900, 900)], [], COSTS, Means())] == ["serial"]
    assert [c.name for c in candidates([region(900, 900)], [1], Costs(MACHINES["cpu"]), Means())] == ["serial"]
    assert [c.name for c in candidates([region(9, 9, pinned=(0, 1))], [1], COSTS, Means(True))] == ["serial"]


@st.composite
def graphs(draw: st.DrawFn) -> list[Region]:
    found: list[Region] = []
    for index in range(draw(st.integers(0, 5))):
        places = [(r.index, branch) for r in found for branch in range(len(r.branches))]
        parent = draw(st.sampled_from([None, *places]))
        # Four inner regions of six branches fit into a branch.
        most = 200 if parent is None else found[parent[0]].branches[parent[1]].kernels // (4 * 6)
        kernels = draw(st.lists(st.integers(0, most), min_size=2, max_size=6))
        pinned = draw(st.sets(st.integers(0, len(kernels) - 1), max_size=len(kernels) - 1))
        found.append(region(*kernels, pinned=tuple(pinned), index=index, parent=parent))
    return found


@PATIENT
@given(graphs(), st.integers(0, 4), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_candidates_of_any_graph(
    regions: list[Region], worker_count: int, streams: bool, captures: bool, shares: bool, turns: bool
) -> None:
    means = Means(streams, captures, captures_workers=captures, shares=shares, turns=turns)
    found = candidates(regions, range(1, worker_count + 1), COSTS, means)
    plans = [candidate.plan for candidate in found]
    assert [plan.is_serial for plan in plans].count(True) == 1
    assert len(found) <= MAX_CANDIDATES
    assert found == tuple(sorted(found, key=lambda candidate: candidate.predicted_us))
    for one, other in itertools.combinations(plans, 2):
        assert kind_of(one) != kind_of(other)
    assert any(plan.captured for plan in plans) == captures
    for plan in plans:
        assert fits(plan, regions, worker_count, means) is None
        assert all(sum(shares_of(choice).values()) <= 300 for choice in plan.regions.values())
    if worker_count:
        outer = [r.index for r in regions if r.parent is None and hopeless(r, COSTS) is None]
        assert any(set(outer) <= set(lanes_of(plan)) for plan in plans if not plan.streams and not plan.captured)


def shares_of(choice: Assignment | Declined) -> dict[int, int]:
    """By lane with a share, how large it is."""
    return {lane: share for lane, (_, share) in places_of(choice).items()} if isinstance(choice, Assignment) else {}


def kind_of(plan: Plan) -> tuple[object, ...]:
    return plan.captured, plan.channels_last, plan.has_shares, lanes_of(plan)


def lanes_of(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {i: c.lanes for i, c in plan.regions.items() if isinstance(c, Assignment) and any(c.lanes)}


def test_nesting() -> None:
    assert nesting_of(NESTED) == {0: [1], 1: [0], 2: []}


def test_bound_follows_the_critical_path() -> None:
    assert bound([region(10, 20, 30), region(5, 5, index=1)], COSTS) == Bound(1800 + 300, 900 + 150)
    inner_saves = 2 * 130 * 30
    assert bound(NESTED[:2], COSTS) == Bound(440 * 30, 400 * 30 - inner_saves)
    assert Bound(3000, 1000).speed_up == 3
    assert Bound(3000, 1000).step_speed_up(5000) == 5 / 3
    assert bound([], COSTS).speed_up == bound([], COSTS).step_speed_up(0.0) == 1


@PATIENT
@given(graphs(), st.integers(1, 4))
def test_no_prediction_is_better_than_the_bound(regions: list[Region], worker_count: int) -> None:
    best = min(c.predicted_us for c in candidates(regions, range(1, worker_count + 1), COSTS, Means(streams=True)))
    assert best >= bound(regions, COSTS).critical_us - 1e-6


def test_memory_is_contexts_slots_and_activations() -> None:
    regions = [region(100, 100, 100, crossing_bytes=1000, moved_bytes=4000)]
    assert memory_needed_bytes(Plan({0: NO}), regions) == 0
    plan = Plan({0: Assignment((0, 1, 2))})
    assert memory_needed_bytes(plan, regions) == 2 * CONTEXT_BYTES + 2 * 2 * 2000 + 2 * 2000
    assert memory_needed_bytes(plan, regions, ready_workers=[1, 2, 3]) == 2 * 2 * 2000 + 2 * 2000
    assert memory_needed_bytes(Plan({0: Assignment((0, -1, 0))}), regions) == 2000
    shared = Plan({0: Assignment((-1, -2, -1), (30, 70, 30))})
    assert memory_needed_bytes(shared, regions) == 6000 + 2 * SHARE_BYTES


def test_candidates_for_which_there_is_no_memory_are_left_out() -> None:
    regions = [region(100, 100, 100, 100)]
    found = candidates(regions, [1, 2, 3], COSTS, Means())
    kept = affordable(found, regions, free_bytes=CONTEXT_BYTES + 1)
    assert [candidate.name for candidate in kept] == ["workers, 2 lanes", "serial"]
    assert [candidate.name for candidate in affordable(found, regions, free_bytes=-1)] == ["serial"]
    assert too_large(kept[0].plan, regions, 2**20) == "needs 700 MiB of the device's memory, 1 MiB are free"
    assert too_large(kept[0].plan, regions, CONTEXT_BYTES) is None
