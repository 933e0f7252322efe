"""Longest processing time first, against every possible assignment."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made import GPU, PATIENT, region

from mpsrun.plan.assign import hopeless, longest_first, region_us, spread
from mpsrun.plan.cost import MACHINES, STREAM_US, Costs

PIECES = st.lists(st.integers(1, 50), min_size=1, max_size=7)


def makespan(pieces: list[int], lanes: dict[int, int], load: dict[int, float]) -> float:
    total = dict(load)
    for piece, lane in lanes.items():
        total[lane] += pieces[piece]
    return max(total.values())


def shortest(pieces: list[int], load: dict[int, float]) -> float:
    every = itertools.product(load, repeat=len(pieces))
    return min(makespan(pieces, dict(enumerate(lanes)), load) for lanes in every)


@PATIENT
@given(PIECES, st.integers(1, 4))
@example([5, 5, 4, 4, 3, 3, 3], 3)  # the worst there is
def test_at_most_a_third_longer_than_the_best(pieces: list[int], lane_count: int) -> None:
    load = dict.fromkeys(range(lane_count), 0.0)
    found = makespan(pieces, longest_first(dict(enumerate(pieces)), load), load)
    assert found <= (4 / 3 - 1 / (3 * lane_count)) * shortest(pieces, load) + 1e-9


@PATIENT
@given(PIECES, st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_at_most_a_half_longer_where_lanes_are_free_later(pieces: list[int], starts: list[int]) -> None:
    load = {lane: float(start) for lane, start in enumerate(starts)}
    found = makespan(pieces, longest_first(dict(enumerate(pieces)), load), load)
    assert found <= (3 / 2 - 1 / (2 * len(starts))) * shortest(pieces, load) + 1e-9


def test_streams_have_no_crossing_to_wait_for() -> None:
    towers = region(10, 10, 10, 10)
    assert spread(towers, [-1, -2, -3], Costs(GPU)) == (0, -1, -2, -3)
    assert spread(region(9, 3, 3, 3), [-1], Costs(GPU)) == (-1, 0, 0, 0)
    assert spread(region(9, 3, 3, 3, pinned=(0,)), [-1], Costs(GPU)) == (0, -1, -1, -1)


def test_the_lead_may_keep_nothing_but_what_is_pinned() -> None:
    assert spread(region(9, 8, 7), [1, 2], Costs(GPU), lead_share=False) == (1, 2, 2)
    assert spread(region(9, 8, 7, pinned=(1,)), [1, 2], Costs(GPU), lead_share=False) == (1, 0, 2)
    assert spread(region(1, 9), [1], Costs(GPU), nesting=[1], lead_share=False) == (1, 0), "the rest has regions inside"


def test_the_lead_keeps_nothing_where_each_branch_has_a_worker() -> None:
    """But where to hand over the shortest would take longer than to launch it."""
    towers, lanes = region(20, 20, 20, 20), [1, 2, 3, 4]
    assert sorted(spread(towers, lanes, Costs(GPU))) == [1, 2, 3, 4]
    assert sorted(spread(towers, lanes[:3], Costs(GPU))) == [0, 1, 2, 3]
    assert spread(region(20, 20, 20, 9), lanes, Costs(GPU)) == (1, 2, 3, 0)
    assert 0 in spread(towers, lanes, Costs(GPU).captured()), "a replay has no thread to relieve"
    assert 0 in spread(towers, lanes, Costs(GPU), nesting=[1]), "what is inside would be lost"


@pytest.mark.parametrize(
    ("lanes", "us"),
    [
        ((0, 0, 0), 1800.0),
        ((0, 1, 2), 900.0 + 300),
        ((1, 0, 1), 1200.0 + 300),
        ((0, -1, -2), 1800.0 + 2 * STREAM_US),  # one thread launches all of them
        ((0, -1, 1), 900.0 + 300 + STREAM_US),
    ],
)
def test_how_long_a_region_takes(lanes: tuple[int, ...], us: float) -> None:
    assert region_us(region(10, 20, 30), lanes, Costs(GPU)) == us


def test_streams_overlap_what_is_not_launching() -> None:
    waiting = Costs(GPU, {0: (1000.0, 1000.0)})  # of which one op launches for 30 us
    assert region_us(region(1, 1), (0, -1), waiting) == 1000 + STREAM_US
    busy = region(1, 1, flops=10**9)  # 3 ms of the whole device each
    assert region_us(busy, (0, -1), Costs(GPU)) == 6000 + STREAM_US


def test_what_inner_regions_save_shortens_their_branch() -> None:
    assert region_us(region(10, 20), (0, 0), Costs(GPU), {1: 200.0}) == 700
    assert region_us(region(10, 20), (0, 1), Costs(GPU), {1: 200.0}) == 400 + 300


def test_hopeless_regions() -> None:
    assert hopeless(region(2, 5, 3), Costs(GPU)) is not None  # of 300 us at most 150 us
    assert hopeless(region(2, 6, 4), Costs(GPU)) is None
    assert hopeless(region(2, 5, 3), Costs(GPU, {0: (500.0, 500.0, 1.0)})) is None
    assert hopeless(region(900, 900), Costs(MACHINES["cpu"])) == "one op already uses every core of this machine"
