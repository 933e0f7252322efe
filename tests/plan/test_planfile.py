"""Plans of several graphs in one file, and plans that do not fit."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import LINES, PATIENT, PLANS, region

from mpsrun.errors import UsageError
from mpsrun.plan.plan import Assignment, Declined, Means, Plan
from mpsrun.plan.planfile import GraphPlan, PlanFile, fits

ALL = Means(True, True, True, True, True, True, True, True)

TEXT = """# mpsrun plan 1

graph 3f2a9c01d4e5b6a7  4 transformer towers, 4x128x64
region 0: lead | worker 1 | worker 2 | worker 3

graph 00ff00ff
# tried on an H100
region 0: declined, too small
region 1: stream 1 | lead
"""
TOWERS = Plan({0: Assignment((0, 1, 2, 3))})


def test_a_file_is_read_and_written() -> None:
    file = PlanFile.parse(TEXT)
    assert file.plan_for("3f2a9c01d4e5b6a7") == TOWERS
    assert file.graphs["3f2a9c01d4e5b6a7"].description == "4 transformer towers, 4x128x64"
    assert file.plan_for("00ff00ff") == Plan({0: Declined("too small"), 1: Assignment((-1, 0))})
    assert str(file) == TEXT.replace("# tried on an H100\n", "")
    assert (
        str(PlanFile().with_plan("3f2a9c01d4e5b6a7", "4 transformer towers,\n 4x128x64", TOWERS))
        == (TEXT[: TEXT.index("\ngraph 00ff")])
    )


FINGERPRINTS = st.text("0123456789abcdef", min_size=8, max_size=64)


@PATIENT
@given(st.dictionaries(FINGERPRINTS, st.builds(GraphPlan, st.one_of(LINES, st.just("")), PLANS), max_size=4))
def test_any_file_reads_back_from_its_text(graphs: dict[str, GraphPlan]) -> None:
    file = PlanFile(graphs)
    assert PlanFile.parse(str(file)) == file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at the top, found an empty file; write one with --save-plan"),
        ("# mpsrun plan 2\n", "expected '# mpsrun plan 1' at the top, found '# mpsrun plan 2' in line 1"),
        ("region 0: lead\n", "found 'region 0: lead' in line 1"),
        ("# mpsrun plan 1\nregion 0: lead\n", "my.plan, line 2: expected 'graph FINGERPRINT  description'"),
        ("# mpsrun plan 1\ngraph 0A0B0C0D\n", "my.plan, line 2: expected 'graph FINGERPRINT  description'"),
        ("# mpsrun plan 1\ngraph 00ff00ff\ngraph 7\n", "line 3: .*found 'graph 7'; correct or delete the line"),
        ("# mpsrun plan 1\n\ngraph 00ff00ff\nregion 0: led\n", "my.plan, line 4: .*found 'region 0: led'; correct"),
        (
            "# mpsrun plan 1\ngraph 00ff00ff\nregion 0: lead\nregion 0: lead\n",
            "line 4: .*second one for region 0; keep",
        ),
        ("# mpsrun plan 1\ngraph 00ff00ff\ngraph 00ff00ff\n", "line 3: expected each graph once, found 00ff00ff again"),
    ],
)
def test_other_text_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PlanFile.parse(text, "my.plan")


def test_a_graph_that_the_file_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"expected a plan for graph abcdef01, found .*4 transformer towers.*--save"):
        PlanFile.parse(TEXT).plan_for("abcdef01")


NESTED = [region(5, 5), region(3, 3, index=1, parent=(0, 1)), region(1, 1, index=2, parent=(1, 0))]
NO = Declined("no")


@pytest.mark.parametrize(
    ("plan", "regions", "reason"),
    [
        (TOWERS, [region(1, 1, 1, 1)], None),
        (TOWERS, [region(1, 1, 1)], "for another network: expected 3 lanes for region 0, found 4"),
        (TOWERS, [region(1, 1), region(1, 1, index=1)], "expected regions 0, 1, found 0"),
        (TOWERS, [], "expected regions none, found 0"),
        (Plan({0: Assignment((0, 4))}), [region(1, 1)], "uses worker 4, and the run has 3; start more with --workers"),
        (Plan({0: Assignment((1, 0))}), [region(1, 1, pinned=(0,))], "branch 0 of region 0 must stay .*because"),
        (Plan({0: Assignment((1, 0)), 1: Assignment((0, 2)), 2: NO}), NESTED, None),
        (Plan({0: Assignment((0, 1)), 1: Assignment((0, 2)), 2: NO}), NESTED, "region 1 lies inside branch 1"),
        (Plan({0: Assignment((-1, -1, -2), (20, 20, 80))}), [region(1, 1, 1)], None),
        (Plan({0: Assignment((-1, -1, -2), (20, 30, 50))}), [region(1, 1, 1)], "a lane has two shares in region 0"),
        (Plan({0: Assignment((0, -1)), 1: NO, 2: Assignment((0, 2))}), NESTED, "region 2 lies inside branch 1 of .* 0"),
    ],
)
def test_whether_a_plan_fits(plan: Plan, regions: list, reason: str | None) -> None:
    found = fits(plan, regions, 3, ALL)
    assert found is None if reason is None else re.search(reason, found or "")


def test_streams_need_a_device_that_has_them() -> None:
    plan = Plan({0: Assignment((0, -1))})
    assert fits(plan, [region(1, 1)], 0, ALL) is None
    assert (
        fits(plan, [region(1, 1)], 0, replace(ALL, streams=False)) == "it uses stream 1, and this device has no streams"
    )


def test_tuning_needs_a_recording_and_leave_to_choose() -> None:
    plan = Plan({0: Assignment((0, -1))}, captured=True, tuned=True)
    assert fits(plan, [region(1, 1)], 0, ALL) is None
    assert "--tune-convolutions" in (fits(plan, [region(1, 1)], 0, replace(ALL, tunes=False)) or "")
    assert "without workers" in (fits(replace(plan, regions={0: Assignment((0, 1))}), [region(1, 1)], 1, ALL) or "")
    assert "must be captured" in (fits(replace(plan, captured=False), [region(1, 1)], 0, ALL) or "")


def test_gradients_beside_need_a_recording_and_convolutions() -> None:
    plan = Plan({0: Assignment((0, -1))}, captured=True, channels_last=True, beside=True)
    assert str(plan) == "captured\nchannels last\nweight gradients beside\nregion 0: lead | stream 1\n"
    assert Plan.parse(str(plan)) == plan
    regions = [region(1, 1)]
    assert fits(plan, regions, 0, ALL) is None
    unfit = [replace(plan, captured=False), replace(plan, tuned=True), Plan({0: Assignment((0, 1))}, True, beside=True)]
    for other in unfit:
        assert fits(other, regions, 1, replace(ALL, turns=True)) is not None
    reason = fits(replace(plan, channels_last=False), regions, 0, replace(ALL, beside=False))
    assert "weights of their own" in (reason or "")


def test_channels_last_need_a_recording_and_convolutions() -> None:
    plan = Plan({0: Assignment((0, -1))}, captured=True, channels_last=True)
    assert str(plan) == "captured\nchannels last\nregion 0: lead | stream 1\n"
    assert Plan.parse(str(plan)) == plan
    assert fits(plan, [region(1, 1)], 0, ALL) is None
    assert "have convolutions" in (fits(plan, [region(1, 1)], 0, replace(ALL, turns=False)) or "")
    assert "without workers" in (fits(replace(plan, regions={0: Assignment((0, 1))}), [region(1, 1)], 1, ALL) or "")
    assert "must be captured" in (fits(replace(plan, captured=False), [region(1, 1)], 0, ALL) or "")
    assert "tuned convolutions" in (fits(replace(plan, tuned=True), [region(1, 1)], 0, ALL) or "")


def test_compiled_branches_are_those_of_workers_and_asked_for() -> None:
    plan = Plan({0: Assignment((0, 1))}, compiled=True)
    assert str(plan) == "branches compiled\nregion 0: lead | worker 1\n"
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(f"captured\n{plan}") == replace(plan, captured=True)
    assert fits(plan, [region(1, 1)], 1, ALL) is None
    assert "--compile-branches" in (fits(plan, [region(1, 1)], 1, replace(ALL, compiles=False)) or "")
    assert "use workers" in (fits(replace(plan, regions={0: Assignment((0, -1))}), [region(1, 1)], 1, ALL) or "")


def test_shares_need_a_device_that_has_them() -> None:
    plan = Plan({0: Assignment((0, -1), (100, 50))})
    assert fits(plan, [region(1, 1)], 0, ALL) is None
    assert "a share of the multiprocessors" in (fits(plan, [region(1, 1)], 0, replace(ALL, shares=False)) or "")


def test_a_captured_plan_has_workers_or_side_streams() -> None:
    for lanes in ((0, 1), (0, -1)):
        assert fits(Plan({0: Assignment(lanes)}, captured=True), [region(1, 1)], 1, ALL) is None
    both = Plan({0: Assignment((1, -1))}, captured=True)
    assert (
        fits(both, [region(1, 1)], 1, ALL)
        == "it is captured and uses both workers and stream 1, which cannot be; use one of them"
    )
    assert (
        fits(both, [region(1, 1)], 1, replace(ALL, captures=False))
        == "it is captured, which this graph cannot be here (--verbose says why)"
    )
