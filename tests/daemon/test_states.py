"""What the daemon decides, event by event."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsrun.daemon.states import (
    LONGEST_DELAY_S,
    MOST_UNANSWERED,
    START_S,
    Facts,
    Kill,
    KillOrphans,
    Start,
    State,
    Tell,
    adopted,
    advance,
    stopping,
)

LATE = "the control daemon did not get ready within 10 s: no"
READY = State("ready", 10.0)


def kinds(actions: tuple[object, ...]) -> list[type]:
    return [type(action) for action in actions]


def test_from_the_start_to_ready() -> None:
    state, actions = advance(State(), Facts(0.0))
    assert (state.phase, actions) == ("starting", (Start(),))
    state, actions = advance(state, Facts(0.5, control_lives=True, answers=False))
    assert (state.phase, actions) == ("starting", ())
    state, actions = advance(state, Facts(0.6, control_lives=True, answers=True))
    assert (state.phase, actions) == ("ready", (Tell("ready"),))


@pytest.mark.parametrize(
    ("state", "facts", "phase", "actions", "why"),
    [
        (READY, Facts(20.0), "draining", [Tell], "the control daemon ended"),
        (READY, Facts(20.0, True, servers_ended=(7,)), "starting", [Tell], "server 7 ended"),
        (
            replace(READY, unanswered=MOST_UNANSWERED - 1),
            Facts(20.0, True, answers=False, error="hangs"),
            "draining",
            [Kill, Tell],
            "the control daemon gave no good answer 3 times in a row: hangs",
        ),
        (adopted(0.0), Facts(1.0, error="no"), "draining", [Tell], "the control daemon ended at its start: no"),
        (adopted(0.0), Facts(START_S, True, error="no"), "draining", [Kill, Tell], LATE),
        (State("draining"), Facts(20.0, orphans_busy=True), "draining", [], ""),
        (State("draining"), Facts(20.0), "waiting", [KillOrphans, Tell], ""),
        (State("waiting", until_s=30.0), Facts(29.9), "waiting", [], ""),
        (State("waiting", until_s=30.0), Facts(30.0), "starting", [Start], ""),
        (stopping(READY, 20.0), Facts(21.0), "stopping", [], ""),
    ],
)  # fmt: skip
def test_what_facts_make_of_a_state(state: State, facts: Facts, phase: str, actions: list[type], why: str) -> None:
    after, done = advance(state, facts)
    assert (after.phase, kinds(done), after.why) == (phase, actions, why)


def test_one_good_answer_forgives_the_bad_ones() -> None:
    state = READY
    for answer in (False, False, True, False, False):
        state, _ = advance(state, Facts(11.0, True, answers=answer))
    assert state.phase == "ready"


def delays(lifetime_s: float, gets_ready: bool, count: int = 12) -> list[float]:
    """How long each restart is held back, where the control daemon ends after `lifetime_s`."""
    state, found, now_s = State(), [], 0.0
    while len(found) < count:
        state, _ = advance(state, Facts(now_s))
        assert state.phase == "starting"
        if gets_ready:
            state, _ = advance(state, Facts(now_s, True, answers=True))
            state, _ = advance(state, Facts(now_s + lifetime_s - 0.01, True))
        now_s += lifetime_s
        state, _ = advance(state, Facts(now_s))
        state, _ = advance(state, Facts(now_s))
        assert state.phase == "waiting"
        found.append(state.until_s - now_s)
        now_s = state.until_s
    return found


def test_restarts_are_held_back_longer_and_longer() -> None:
    assert delays(0.1, gets_ready=False)[:5] == pytest.approx([0.0, 0.25, 0.5, 1.0, 2.0])
    assert max(delays(0.1, gets_ready=False)) == pytest.approx(LONGEST_DELAY_S)
    assert max(delays(0.1, gets_ready=True)) < 1.01, "it worked, so that it is soon there again"
    assert max(delays(5.0, gets_ready=True)) == 0.0


@given(
    st.lists(
        st.builds(
            Facts,
            now_s=st.just(0.0),
            control_lives=st.booleans(),
            answers=st.sampled_from([None, True, False]),
            servers_ended=st.sampled_from([(), (3,)]),
            orphans_busy=st.booleans(),
        ),
        max_size=60,
    )
)
def test_whatever_is_seen_it_gets_ready_once_all_is_well(seen: list[Facts]) -> None:
    """And no server with clients is ever killed."""
    state, now_s = State(), 0.0
    for facts in seen:
        now_s += 0.7
        state, actions = advance(state, replace(facts, now_s=now_s))
        assert KillOrphans not in kinds(actions) or not facts.orphans_busy
    for _ in range(200):
        now_s += 0.7
        lives = state.phase in ("starting", "ready")
        state, _ = advance(state, Facts(now_s, control_lives=lives, answers=lives or None))
    assert state.phase == "ready"
