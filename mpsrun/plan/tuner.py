"""Tuning on the script's own steps, as a pure state machine: `advance(state, event)` returns state and actions.

Rounds of turns: in a turn one candidate runs some steps, and the first of them are not counted. Every other round goes
the other way round, so that drift hits all alike. After each round the candidates that are clearly slower go, then the
slower half (successive halving, Jamieson and Talwalkar 2016). What is left must beat serial in a rank test and by 1 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpsrun.plan import verdict
from mpsrun.plan.candidates import Candidate

MAX_STEPS = 60
# A first turn meets lazy loading and empty memory pools, a later one what the plan before it left in the queue.
WARM_UP_STEPS = 2
SETTLE_STEPS = 1
TIMED_STEPS = 3
# Before the second round nothing is decided: the first one may have met a drift.
LEAST_ROUNDS = 2


@dataclass(frozen=True)
class StepTimed:
    """A whole training step, from one to the next, took `us` microseconds under this candidate."""

    candidate: int
    us: float


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone for good."""

    worker: int


@dataclass(frozen=True)
class OutOfMemory:
    """There was no memory for this candidate."""

    candidate: int


@dataclass(frozen=True)
class NotCaptured:
    """A candidate that was to be captured cannot be."""

    candidate: int


@dataclass(frozen=True)
class BudgetSpent:
    """Tuning has taken as long as it may; decide with what is there."""


Event = StepTimed | WorkerLost | OutOfMemory | NotCaptured | BudgetSpent


@dataclass(frozen=True)
class Decided:
    """Run under this candidate from now on; `reason` is one line with figures."""

    candidate: int
    reason: str


@dataclass(frozen=True)
class Log:
    """Tell this line."""

    line: str


Action = Decided | Log
Actions = tuple[Action, ...]


@dataclass(frozen=True)
class Turn:
    """A candidate's steps in a row: so many yet to come that are not counted, and then so many that are."""

    candidate: int
    warm_up: int
    timed: int


@dataclass(frozen=True)
class State:
    """All that tuning knows; candidates are meant by their index.

    contenders: still in the running, serial first. out: those that can no longer run. turns: of this round, the first
    one is running. steps: so many training steps were taken.
    """

    candidates: tuple[Candidate, ...]
    contenders: tuple[int, ...]
    times_us: tuple[tuple[float, ...], ...]
    out: frozenset[int] = frozenset()
    turns: tuple[Turn, ...] = ()
    round: int = 0
    steps: int = 0
    decided: int | None = None

    @property
    def serial(self) -> int:
        """The candidate that is a plain run."""
        return next(index for index, candidate in enumerate(self.candidates) if candidate.plan.is_serial)

    @property
    def current(self) -> int:
        """The candidate under which steps run now."""
        return self.turns[0].candidate if self.decided is None else self.decided

    @property
    def challengers(self) -> tuple[int, ...]:
        """The contenders but serial."""
        return tuple(index for index in self.contenders if index != self.serial)

    def table(self) -> verdict.Table:
        """The times so far, to judge by."""
        return verdict.Table(tuple(candidate.name for candidate in self.candidates), self.times_us, self.serial)


def start(candidates: Sequence[Candidate]) -> tuple[State, Actions]:
    """Begin to tune; raises `ValueError` where no candidate is serial."""
    state = settled(candidates, None)
    if len(candidates) == 1:
        return _settle(state, state.serial, "keeps serial: there is nothing else to try")
    return _next_round(state)


def settled(candidates: Sequence[Candidate], chosen: int | None) -> State:
    """The state in which `chosen` was decided before, as by a cache; raises `ValueError` where none is serial."""
    serial = [index for index, candidate in enumerate(candidates) if candidate.plan.is_serial]
    if len(serial) != 1:
        raise ValueError(f"expected one serial candidate, found {len(serial)} of {len(candidates)}")
    others = (index for index in range(len(candidates)) if index != serial[0])
    return State(tuple(candidates), (serial[0], *others), ((),) * len(candidates), decided=chosen)


def again(state: State) -> tuple[State, Actions]:
    """Tune anew, without the candidates that can no longer run."""
    able = tuple(index for index in range(len(state.candidates)) if index not in state.out | {state.serial})
    empty: tuple[tuple[float, ...], ...] = ((),) * len(state.candidates)
    anew = State(state.candidates, (state.serial, *able), empty, out=state.out)
    return _next_round(anew) if able else _decide(anew)


def advance(state: State, event: Event) -> tuple[State, Actions]:
    """What an event makes of the state, and what is to be done."""
    match event:
        case WorkerLost(worker):
            using = [i for i, candidate in enumerate(state.candidates) if worker in candidate.plan.workers]
            return _rule_out(state, using, f"worker {worker} is lost")
        case OutOfMemory(candidate):
            return _rule_out(state, [candidate], f"no memory for {state.candidates[candidate].name}")
        case NotCaptured(candidate):
            return _rule_out(state, [candidate], f"{state.candidates[candidate].name} cannot be captured")
        case _ if state.decided is not None:
            return state, ()
        case StepTimed():
            return _step_timed(state, event)
        case BudgetSpent():
            return _decide(state)


def medians_us(state: State) -> dict[str, float]:
    """By name, the median step of each candidate that was timed."""
    table = state.table()
    return {table.names[index]: table.median_us(index) for index, times in enumerate(state.times_us) if times}


def _step_timed(state: State, event: StepTimed) -> tuple[State, Actions]:
    state = replace(state, steps=state.steps + 1)
    turn = state.turns[0]
    if event.candidate != turn.candidate:  # it was under way when the turn ended
        state = _with_time(state, event) if state.times_us[event.candidate] else state
    elif turn.warm_up:
        state = replace(state, turns=(replace(turn, warm_up=turn.warm_up - 1), *state.turns[1:]))
    else:
        state = _with_time(state, event)
        state = replace(state, turns=(replace(turn, timed=turn.timed - 1), *state.turns[1:]))
    if state.steps >= MAX_STEPS:
        return _decide(state)
    return _next_turn(state, state.turns[1:]) if state.turns[0].timed == 0 else (state, ())


def _with_time(state: State, event: StepTimed) -> State:
    times = list(state.times_us)
    times[event.candidate] = (*times[event.candidate], event.us)
    return replace(state, times_us=tuple(times))


def _next_turn(state: State, turns: tuple[Turn, ...]) -> tuple[State, Actions]:
    if not turns:
        return _end_round(state)
    return replace(state, turns=turns), ()


def _next_round(state: State) -> tuple[State, Actions]:
    """A turn for each contender, shorter ones where the steps run out; the decision where none are left."""
    warm_up = SETTLE_STEPS if state.round else WARM_UP_STEPS
    timed = min(TIMED_STEPS, (MAX_STEPS - state.steps) // len(state.contenders) - warm_up)
    if timed < 1:
        return _decide(state)
    order = reversed(state.contenders) if state.round % 2 else state.contenders
    state = replace(state, round=state.round + 1)
    return _next_turn(state, tuple(Turn(index, warm_up, timed) for index in order))


def _end_round(state: State) -> tuple[State, Actions]:
    state, dropped = _drop(state)
    table = state.table()
    last = len(state.challengers) == 1 and table.surely_beats_serial(state.challengers[0])
    done = state.round >= LEAST_ROUNDS and (last or not state.challengers)
    state, actions = _decide(state) if done else _next_round(state)
    return state, (*dropped, *actions)


def _drop(state: State) -> tuple[State, Actions]:
    """Without the clearly slower ones, and of many others without the slower half."""
    table = state.table()
    best = table.fastest(state.contenders)
    ranked = sorted(state.challengers, key=table.low_us)
    kept = [index for index in ranked if not table.beats(best, index)][: max(2, (len(ranked) + 1) // 2)]
    if state.round < LEAST_ROUNDS:
        kept = kept or ranked[:1]
    lines = tuple(Log(table.drop_line(index, best)) for index in ranked if index not in kept)
    contenders = (state.serial, *(index for index in state.challengers if index in kept))
    return replace(state, contenders=contenders), lines


def _decide(state: State, why: str = "") -> tuple[State, Actions]:
    """Keep the fastest that beat serial; of those dropped before, only where no challenger is left.

    Of several that are as fast, one without workers, whose processes only take memory then, and of these the one that
    should be the fastest.
    """
    table = state.table()
    able = [index for index in range(len(state.candidates)) if index not in state.out and index != state.serial]
    winners = [index for index in state.challengers or able if table.beats(index, state.serial)]
    alike = table.alike(table.fastest(winners), winners) if winners else [state.serial]
    chosen = min(alike, key=lambda index: _preference(state.candidates[index]))
    verb = f"{why}; takes" if why else "keeps"
    return _settle(state, chosen, f"{verb} {table.reason(chosen, able)}")


def _preference(candidate: Candidate) -> tuple[bool, float]:
    return bool(candidate.plan.workers), candidate.predicted_us


def _settle(state: State, chosen: int, reason: str) -> tuple[State, Actions]:
    return replace(state, decided=chosen, turns=()), (Decided(chosen, reason),)


def _rule_out(state: State, indexes: Sequence[int], why: str) -> tuple[State, Actions]:
    """Never use these again; serial, which needs nothing, stays."""
    out = state.out | (set(indexes) - {state.serial})
    contenders = tuple(index for index in state.contenders if index not in out)
    state = replace(state, out=out, contenders=contenders)
    if state.decided is not None:
        return _decide(state, why) if state.decided in out else (state, ())
    if not state.challengers:
        return _decide(state, why)
    turns = tuple(turn for turn in state.turns if turn.candidate not in out)
    return (replace(state, turns=turns), ()) if turns[:1] == state.turns[:1] else _next_turn(state, turns)
