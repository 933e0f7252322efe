"""Plans: who runs where, when it is declined, and plans as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import GPU, PATIENT, PLANS, region

from mpsrun.errors import UsageError
from mpsrun.graph.regions import Branch
from mpsrun.plan.cost import MACHINES, Costs, branch_us
from mpsrun.plan.lanes import is_stream, is_worker, lane_name, lane_of
from mpsrun.plan.plan import Assignment, Declined, Plan, decide


def test_cost_is_the_slowest_of_launching_computing_and_moving() -> None:
    assert branch_us(Branch((), kernels=10), GPU) == 300
    assert branch_us(Branch((), kernels=1, flops=10**9), GPU) == 3_000
    assert branch_us(Branch((), kernels=1, bytes=10**10), GPU) == 30_000


def test_the_rest_of_the_network_stays() -> None:
    """An early head goes to a worker; what it stands beside has regions of its own, which would be lost there."""
    head_and_rest = region(10, 500)
    assert decide(head_and_rest, [1, 2], Costs(GPU), forced=True) == Assignment((0, 1))
    assert decide(head_and_rest, [1, 2], Costs(GPU), forced=True, nesting=[1]) == Assignment((1, 0))
    towers = region(100, 100, 100)
    assert decide(towers, [1, 2], Costs(GPU), forced=True, nesting=[0, 1, 2]) == Assignment((0, 1, 2))


def test_shortest_branch_stays_and_the_rest_spreads() -> None:
    plan = decide(region(10, 100, 60, 50), [1, 2], Costs(GPU), forced=False)
    assert plan == Assignment((0, 1, 2, 0))  # the lead has 300 us of crossing beside the first branch's


def test_pinned_branches_stay_in_the_lead() -> None:
    plan = decide(region(10, 100, 60, pinned=(0, 2)), [1, 2], Costs(GPU), forced=True)
    assert plan == Assignment((0, 1, 0))


def test_forced_spreads_even_small_branches() -> None:
    assert decide(region(1, 1, 1, 1), [1, 2, 3], Costs(GPU), forced=True) == Assignment((0, 1, 2, 3))


def test_forced_uses_a_worker_even_where_the_lead_has_next_to_nothing() -> None:
    assert decide(region(0, 0, pinned=(0,)), [1], Costs(GPU), forced=True) == Assignment((0, 1))
    assert decide(region(5, 1, pinned=(1,)), [1], Costs(GPU), forced=True) == Assignment((1, 0))


def test_more_branches_than_lanes() -> None:
    plan = decide(region(*[30] * 9), [1, 2], Costs(GPU), forced=False)
    assert isinstance(plan, Assignment)
    assert sorted(plan.lanes.count(lane) for lane in (0, 1, 2)) == [3, 3, 3]


def test_small_regions_are_declined_with_figures() -> None:
    plan = decide(region(5, 5), [1], Costs(GPU), forced=False)
    assert isinstance(plan, Declined)
    assert "of 300 us it would save -150 us" in plan.reason


def test_bytes_that_cross_count() -> None:
    assert isinstance(decide(region(100, 100), [1], Costs(GPU), forced=False), Assignment)
    assert isinstance(decide(region(100, 100, crossing_bytes=10**9), [1], Costs(GPU), forced=False), Declined)


def test_shared_cores_decline_unless_forced() -> None:
    big = region(1000, 1000)
    assert isinstance(decide(big, [1], Costs(MACHINES["cpu"]), forced=False), Declined)
    assert isinstance(decide(big, [1], Costs(MACHINES["cpu"]), forced=True), Assignment)


def test_without_workers_or_unpinned_branches() -> None:
    assert isinstance(decide(region(9, 9), [], Costs(GPU), forced=True), Declined)
    assert isinstance(decide(region(9, 9, pinned=(0, 1)), [1], Costs(GPU), forced=True), Declined)


def test_a_device_that_one_branch_keeps_busy_is_left_to_the_lead() -> None:
    """Rates are those of the whole device: two branches that are bound by them take as long together as in turn."""
    plan = decide(region(1, 1, flops=10**10), [1], Costs(GPU), forced=False)
    assert isinstance(plan, Declined)
    assert "of 60000 us it would save -300 us" in plan.reason


def test_measured_costs_go_before_estimates() -> None:
    small = region(1, 1, 1)
    assert isinstance(decide(small, [1, 2], Costs(GPU), forced=False), Declined)
    measured = Costs(GPU, {0: (9_000.0, 1_000.0, 9_000.0)})
    assert decide(small, [1, 2], measured, forced=False) == Assignment((1, 0, 2))
    assert measured.serial_us(small) == 19_000


def test_names_of_lanes() -> None:
    names = {0: "lead", 1: "worker 1", 12: "worker 12", -1: "stream 1", -12: "stream 12"}
    for lane, name in names.items():
        assert lane_name(lane) == name
        assert lane_of(name) == (lane, 100)
        assert (is_worker(lane), is_stream(lane)) == (name.startswith("worker"), name.startswith("stream"))
    assert [lane_of(name) for name in ("", "worker", "worker 01", "Lead", "stream 0", "worker ٣")] == [None] * 6
    assert lane_name(-2, 25) == "stream 2 at 25%"
    assert lane_of("stream 2 at 25%") == (-2, 25)
    assert [lane_of(f"stream 2{rest}") for rest in (" at 0%", " at 100%", " at 5", " 5%", " at -5%")] == [None] * 5
    assert lane_of("lead at 25%") is None


def test_what_a_lost_worker_did_gets_the_whole_gpu() -> None:
    plan = Plan({0: Assignment((0, 1, 2), (100, 40, 60)), 1: Assignment((1, 1), (50, 50))})
    assert plan.has_shares
    assert plan.without([1]).regions == {0: Assignment((0, 0, 2), (100, 100, 60)), 1: Assignment((0, 0))}
    assert not plan.without([1, 2]).has_shares


def test_plans_know_what_they_use() -> None:
    plan = Plan({0: Assignment((0, 2, -1)), 1: Assignment((-3, 1, 2)), 2: Declined("small")})
    assert (plan.workers, plan.streams, plan.is_serial) == ({1, 2}, {-1, -3}, False)
    assert Plan({0: Assignment((0, 0)), 1: Declined("small")}).is_serial


@PATIENT
@given(PLANS)
def test_any_plan_reads_back_from_its_text(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@PATIENT
@given(st.text())
def test_any_text_is_a_plan_or_a_usage_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except UsageError:
        return
    assert Plan.parse(str(plan)) == plan


def test_a_reason_of_several_lines_is_written_as_one() -> None:
    assert str(Plan({0: Declined("too\n small")})) == "region 0: declined, too small\n"


def test_plans_read_back_from_their_text() -> None:
    plan = Plan({0: Assignment((0, 1, 2, 0)), 1: Declined("too small: of 3 us"), 7: Assignment((0, 12))})
    assert str(plan) == (
        "region 0: lead | worker 1 | worker 2 | lead\nregion 1: declined, too small: of 3 us\n"
        "region 7: lead | worker 12\n"
    )
    assert Plan.parse(str(plan)) == plan
    shared = Plan({0: Assignment((0, -1, -2, -2), (100, 100, 30, 30))}, captured=True)
    assert str(shared) == "captured\nregion 0: lead | stream 1 | stream 2 at 30% | stream 2 at 30%\n"
    assert Plan.parse(str(shared)) == shared
    assert Plan.parse("# a remark\n\n  region 3: worker 1 | lead\n") == Plan({3: Assignment((1, 0))})


@pytest.mark.parametrize(
    "text",
    ["region", "region x: lead", "region 0: led", "region 0: worker 0", "region 0: stream 0", "region 0: stream -1",
     "region 0: worker 1 stream 1", f"region {'9' * 5000}: lead", f"region 0: worker {'9' * 5000}",
     "region 0: lead | | lead", "region 0: lead, worker 1", "region 0: declined", "region 0: lead\nregion 0: lead"],
)  # fmt: skip
def test_other_text_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="plan, line"):
        Plan.parse(text)
