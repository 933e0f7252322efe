"""What the daemon does next, as a pure state machine: `advance(state, facts)` returns state and actions.

    starting --answers--> ready --control daemon ended or hangs--> draining --no client left--> waiting --> starting
        |                  |  ^                                      ^
        | no answer        |  | answers                              |
        +----------------->|  +--- starting <--- server ended -------+
                           |
    any --stop--> stopping

Draining: a server outlives its control daemon, and its clients go on. They are left alone until the last has ended.
"""

from dataclasses import dataclass, replace

from mpsrun.mps.places import Phase

START_S = 10.0  # from the start of a control daemon to its answer
MOST_UNANSWERED = 3  # looks in a row, after which a control daemon that lives counts as hanging
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 30.0
PROVEN_S = 1.0  # one that was ready for so long is started again at once
MOST_FAILURES_READY = 3  # what counts of the failures before, once one got ready: the next delay is 1 s


@dataclass(frozen=True)
class Facts:
    """What is seen now. answers: whether the control daemon answered, None where it was not asked.

    servers_ended: since the last time. orphans: servers without their control daemon; busy: they have clients.
    """

    now_s: float
    control_lives: bool = False
    answers: bool | None = None
    servers_ended: tuple[int, ...] = ()
    orphans_busy: bool = False
    error: str = ""


@dataclass(frozen=True)
class State:
    """phase_s: when the phase began; until_s: when it ends by itself. failures: starts in a row without success."""

    phase: Phase = "waiting"
    phase_s: float = 0.0
    until_s: float = 0.0
    failures: int = 0
    faults: int = 0
    unanswered: int = 0
    why: str = ""


@dataclass(frozen=True)
class Start:
    """Start a control daemon, where the files of an earlier one are removed."""


@dataclass(frozen=True)
class Kill:
    """Kill the control daemon."""


@dataclass(frozen=True)
class KillOrphans:
    """Kill servers that have neither control daemon nor clients."""


@dataclass(frozen=True)
class Tell:
    """Say this line."""

    line: str


Action = Start | Kill | KillOrphans | Tell
Step = tuple[State, tuple[Action, ...]]


def advance(state: State, facts: Facts) -> Step:
    """What the facts make of the state, and what is to be done."""
    match state.phase:
        case "waiting":
            return _start(state, facts) if facts.now_s >= state.until_s else (state, ())
        case "starting":
            return _starting(state, facts)
        case "ready":
            return _ready(state, facts)
        case "draining":
            return _draining(state, facts)
        case "stopping":
            return state, ()


def stopping(state: State, now_s: float) -> State:
    """The state in which nothing is started again."""
    return replace(state, phase="stopping", phase_s=now_s)


def adopted(now_s: float) -> State:
    """The state of a daemon that finds the control daemon of one before it."""
    return State("starting", now_s, now_s + START_S)


def _start(state: State, facts: Facts) -> Step:
    return _enter(state, "starting", facts, START_S), (Start(),)


def _starting(state: State, facts: Facts) -> Step:
    if not facts.control_lives:
        return _fail(state, facts, f"the control daemon ended at its start: {facts.error}", ())
    if facts.answers:
        state = replace(state, unanswered=0, failures=min(state.failures, MOST_FAILURES_READY))
        return _enter(state, "ready", facts), (Tell("ready"),)
    if facts.now_s >= state.until_s:
        return _fail(
            state, facts, f"the control daemon did not get ready within {START_S:g} s: {facts.error}", (Kill(),)
        )
    return state, ()


def _ready(state: State, facts: Facts) -> Step:
    if facts.now_s - state.phase_s > PROVEN_S:
        state = replace(state, failures=0)
    if not facts.control_lives:
        return _fail(state, facts, "the control daemon ended", ())
    if facts.answers is not None:
        state = replace(state, unanswered=0 if facts.answers else state.unanswered + 1)
    if state.unanswered >= MOST_UNANSWERED:
        why = f"the control daemon gave no good answer {MOST_UNANSWERED} times in a row: {facts.error}"
        return _fail(state, facts, why, (Kill(),))
    if facts.servers_ended:
        pids = ", ".join(str(pid) for pid in facts.servers_ended)
        state = replace(state, faults=state.faults + 1, why=f"server {pids} ended")
        return _enter(state, "starting", facts, START_S), (
            Tell(f"{state.why}; the control daemon starts the next one"),
        )
    return state, ()


def _draining(state: State, facts: Facts) -> Step:
    if facts.orphans_busy:
        return state, ()
    was_proven = state.failures == 0
    delay_s = 0.0 if was_proven else min(FIRST_DELAY_S * 2.0 ** (state.failures - 1), LONGEST_DELAY_S)
    state = replace(_enter(state, "waiting", facts, delay_s), failures=state.failures + 1)
    return state, (KillOrphans(), Tell(f"starts the control daemon again in {delay_s:g} s"))


def _fail(state: State, facts: Facts, why: str, actions: tuple[Action, ...]) -> Step:
    state = replace(_enter(state, "draining", facts), faults=state.faults + 1, why=why)
    rest = "; its server still has clients, which go on" if facts.orphans_busy else ""
    return state, (*actions, Tell(f"{why}{rest}"))


def _enter(state: State, phase: Phase, facts: Facts, for_s: float = 0.0) -> State:
    return replace(state, phase=phase, phase_s=facts.now_s, until_s=facts.now_s + for_s)
