"""Plans that follow the load, as a pure state machine around the tuner: from state and event to state and actions.

    tuning --decided--> watching --load or step time changed--> preparing --prepared--> tuning (the same candidates)
                        |      ^
                        +------+ load as at home: the plan of home; memory short: a plan with fewer workers

*Home* is the load under which a plan was chosen first, and its plan. A change of plan is followed by a cool-down; one
that led to nothing doubles it. A plan that was chosen away from home is looked at again from time to time, since
without NVML nobody says that the load has ended.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mpsrun.plan import tuner
from mpsrun.plan.candidates import Candidate
from mpsrun.plan.load import Load, Reading, Watched
from mpsrun.plan.ranks import chance_of

COOL_DOWN_S = 5.0
MOST_DOUBLINGS = 4
PREPARE_S = 20.0  # workers may be busy; after this the plan stays as it is
LOOK_AGAIN_S, LOOK_AGAIN_TRIALS = 30.0, 20.0  # the longer one: trials take at most one step of twenty
WINDOW = 15  # steps that are compared
LOOK_EVERY = 5  # of them, since to compare takes as long as all the rest
SETTLE_STEPS = 2
DRIFT = 1.10
DRIFT_HOLD_S = 1.5  # longer than a tenant takes to be noticed, which tells more
DRIFT_LOOKS = 3  # and so many looks in a row: with steps of a second, one look would often be chance
ALPHA = 0.005  # every step is another opportunity for chance


@dataclass(frozen=True)
class Now:
    """A step begins; reading: what the monitor saw since the last one, if anything."""

    now_s: float
    reading: Reading | None = None


@dataclass(frozen=True)
class Prepared:
    """All candidates can run."""


Event = tuner.Event | Now | Prepared


@dataclass(frozen=True)
class Tell:
    """Say this line, which has the reason of a trial."""

    line: str


Action = tuner.Action | Tell
Actions = tuple[Action, ...]
Step = tuple["State", Actions]


@dataclass(frozen=True)
class Window:
    """Step times under the present plan: the first ones, to compare with, and the latest (us)."""

    first_us: tuple[float, ...] = ()
    latest_us: tuple[float, ...] = ()
    settle: int = SETTLE_STEPS
    count: int = 0

    def timed(self, us: float) -> "Window":
        """With one more step."""
        if self.settle:
            return replace(self, settle=self.settle - 1)
        if len(self.first_us) < WINDOW:
            return replace(self, first_us=(*self.first_us, us))
        return replace(self, latest_us=(*self.latest_us, us)[-WINDOW:], count=self.count + 1)

    @property
    def is_due(self) -> bool:
        """Whether it is time to compare."""
        return len(self.latest_us) == WINDOW and self.count % LOOK_EVERY == 0

    def drift(self) -> str:
        """By how much steps changed, in words; empty where they did not, or chance explains it."""
        first, latest = statistics.median(self.first_us), statistics.median(self.latest_us)
        slower = latest > DRIFT * first and chance_of(self.first_us, self.latest_us) <= ALPHA
        faster = latest * DRIFT < first and chance_of(self.latest_us, self.first_us) <= ALPHA
        if not slower and not faster:
            return ""
        return f"steps take {latest / 1000:.2f} ms instead of {first / 1000:.2f} ms ({latest / first - 1:+.0%})"


@dataclass(frozen=True)
class State:
    """tuning: the tuner's state. under: the load that the present plan was chosen under.

    changed_s: when a plan was changed or tried last, None for just now. why: of the preparation or trial under way.
    before: the plan until then, is_look: whether the trial has no other reason than to look again. fruitless: other
    trials in a row that changed nothing; sheds: plans given up for memory; doubts: looks in a row that found no better
    plan. drifted_s, drifts: since when, and in how many looks, step times have drifted. tried_s: when the last trial
    ended.
    """

    tuning: tuner.State
    now_s: float = 0.0
    watched: Watched = field(default_factory=Watched)
    under: Load = field(default_factory=Load)
    home: int | None = None
    home_load: Load = field(default_factory=Load)
    window: Window = field(default_factory=Window)
    changed_s: float | None = None
    is_preparing: bool = False
    why: str = ""
    before: int | None = None
    is_look: bool = False
    fruitless: int = 0
    sheds: int = 0
    doubts: int = 0
    look_again_s: float | None = None
    drifted_s: float | None = None
    drifts: int = 0
    tried_s: float = 0.0

    @property
    def decided(self) -> int | None:
        return self.tuning.decided

    @property
    def current(self) -> int:
        """The candidate under which steps run now."""
        return self.tuning.current

    @property
    def since_change_s(self) -> float:
        """For how long the plan has stood."""
        return 0.0 if self.changed_s is None else self.now_s - self.changed_s

    @property
    def kept(self) -> frozenset[int]:
        """The candidates that may be needed at once; where memory is short, nothing is kept for later."""
        if self.under.tight and self.decided is not None:
            return frozenset({self.decided})
        return frozenset(index for index in (self.home, self.decided) if index is not None)


def start(candidates: Sequence[Candidate]) -> Step:
    """Begin to tune; raises `ValueError` where no candidate is serial."""
    tuning, actions = tuner.start(candidates)
    return State(tuning, home=tuning.decided), actions


def settled(candidates: Sequence[Candidate], chosen: int) -> State:
    """The state in which `chosen` was decided before, as by a cache; raises `ValueError` where none is serial."""
    return State(tuner.settled(candidates, chosen), home=chosen)


def advance(state: State, event: Event) -> Step:
    """What an event makes of the state, and what is to be done."""
    match event:
        case Now():
            state = replace(state, now_s=event.now_s)
            if state.changed_s is None:
                state = replace(state, changed_s=event.now_s)
            if event.reading is not None:
                state = _see(state, event.reading)
            return _consider(state) if state.decided is not None else _consider_trial(state)
        case Prepared():
            return _try(state) if state.is_preparing and state.decided is not None else (state, ())
        case tuner.StepTimed() if state.decided is not None:
            if event.candidate == state.decided:
                state = replace(state, window=state.window.timed(event.us))
            return state, ()
        case _:
            return _follow(state, *tuner.advance(state.tuning, event))


def _see(state: State, reading: Reading) -> State:
    """Take in a reading. The first one may come only after the plan was chosen, under just that load."""
    watched = state.watched.seen(reading, state.now_s)
    if state.watched.is_new and state.before is None and state.tuning.steps:
        state = replace(state, under=watched.load, home_load=watched.load)
    return replace(state, watched=watched)


def _follow(state: State, tuning: tuner.State, actions: tuner.Actions) -> Step:
    """Take over what the tuner decided."""
    was_tuning = state.tuning.decided is None
    state = replace(state, tuning=tuning)
    if tuning.decided is not None and was_tuning:
        state = _end_trial(state, tuning.decided)
    elif any(isinstance(action, tuner.Decided) for action in actions):  # a worker or memory was lost
        state = _changed(state)
    if state.home in tuning.out and tuning.decided is not None:
        state = replace(state, home=tuning.decided, home_load=state.under)
    return state, actions


def _end_trial(state: State, chosen: int) -> State:
    """Note what a trial led to. The load that it began under counts, should another have come meanwhile."""
    trial_s = state.since_change_s
    state = _changed(state)
    if state.home is None or state.under == state.home_load:
        state = replace(state, home=chosen, home_load=state.under)
    if state.before is None:
        return replace(state, home_load=state.watched.load, under=state.watched.load)
    state = replace(state, tried_s=state.now_s)
    has_changed = chosen != state.before
    if has_changed:
        state = replace(state, fruitless=0, doubts=0)
    elif not state.is_look:
        state = replace(state, fruitless=min(state.fruitless + 1, MOST_DOUBLINGS))
    if not has_changed and chosen == state.home and not state.doubts:
        return state
    pause_s = max(LOOK_AGAIN_S, LOOK_AGAIN_TRIALS * trial_s) * 2.0**state.doubts
    return replace(state, look_again_s=state.now_s + pause_s, doubts=min(state.doubts + 1, MOST_DOUBLINGS - 1))


def _changed(state: State) -> State:
    state = replace(state, changed_s=None, window=Window(), is_preparing=False, why="")
    return replace(state, look_again_s=None, drifted_s=None, drifts=0)


def _consider_trial(state: State) -> Step:
    """A trial needs memory: where that gets short, it is decided with what is there."""
    if state.before is None or not state.watched.load.tight or state.under.tight:
        return state, ()
    return _follow(state, *tuner.advance(state.tuning, tuner.BudgetSpent()))


def _consider(state: State) -> Step:
    """Whether the plan is still the right one."""
    if state.is_preparing and state.watched.load.tight:
        state = replace(state, is_preparing=False)
    if state.is_preparing:
        late = state.since_change_s > PREPARE_S
        return (replace(state, is_preparing=False, changed_s=state.now_s), ()) if late else (state, ())
    if state.since_change_s < COOL_DOWN_S or state.home is None:
        return state, ()
    load = state.watched.load
    if load.tight and not state.under.tight:
        return _shed(state)
    if load != state.under:
        return _follow_load(state, load)
    if load.tight or state.since_change_s < _patience_s(state.fruitless):
        return state, ()
    if state.window.is_due:
        return _consider_drift(state)
    if state.look_again_s is not None and state.now_s >= state.look_again_s:
        return _prepare(replace(state, is_look=True), "looks again whether another plan is faster by now")
    return state, ()


def _consider_drift(state: State) -> Step:
    if why := state.window.drift():
        since_s = state.now_s if state.drifted_s is None else state.drifted_s
        state = replace(state, drifted_s=since_s, drifts=state.drifts + 1)
        has_held = state.now_s - since_s >= DRIFT_HOLD_S and state.drifts >= DRIFT_LOOKS
        has_held = has_held and not state.watched.is_changing
        return _prepare(replace(state, is_look=False), why) if has_held else (state, ())
    return replace(state, drifted_s=None, drifts=0), ()


def _follow_load(state: State, load: Load) -> Step:
    why = state.watched.told(state.under)
    if load == state.home_load:
        if state.decided == state.home:
            return replace(state, under=load, window=Window()), ()
        if state.since_change_s < _patience_s(state.sheds):
            return state, ()
        return _go_home(state, why)
    if load.tight:
        return replace(state, under=load), ()
    if load.tenants == state.under.tenants and state.watched.first_s(state.under) <= state.tried_s:
        return replace(state, under=load), ()  # it came with what the last trial was for
    came = load.tenants != state.under.tenants  # that is worth a look whatever came of others
    # What is going right now may be more than that.
    is_early = state.watched.is_changing or state.since_change_s < _patience_s(state.fruitless)
    if not came and is_early:
        return state, ()
    return _prepare(replace(state, under=load, is_look=False), why)


def _go_home(state: State, why: str) -> Step:
    assert state.home is not None, "asked for before"
    name = state.tuning.candidates[state.home].name
    tuning = replace(state.tuning, decided=state.home)
    state = replace(_changed(state), tuning=tuning, under=state.home_load, fruitless=0, doubts=0)
    return state, (tuner.Decided(state.current, f"{why}: back to {name}"),)


def _shed(state: State) -> Step:
    """A plan with fewer workers: of those that were timed the fastest, else the one with the most; serial at last."""
    tuning, why = state.tuning, state.watched.told(state.under)
    load = state.watched.load
    count = _workers(state, state.current)
    fewer = [i for i in range(len(tuning.candidates)) if i not in tuning.out and _workers(state, i) < count]
    if not fewer:
        return replace(state, under=load), ()
    table = tuning.table()
    chosen = min(fewer, key=lambda index: (table.median_us(index), -_workers(state, index)))
    state = replace(_changed(state), tuning=replace(tuning, decided=chosen), under=load)
    state = replace(state, sheds=min(state.sheds + 1, MOST_DOUBLINGS))
    line = f"{why}: takes {tuning.candidates[chosen].name}, with {_workers(state, chosen)} instead of {count} workers"
    return state, (tuner.Decided(chosen, line),)


def _prepare(state: State, why: str) -> Step:
    state = replace(state, is_preparing=True, why=why, changed_s=state.now_s)
    return state, ()


def _try(state: State) -> Step:
    """Have the candidates take turns again."""
    before = state.decided
    tuning, actions = tuner.again(state.tuning)
    said = Tell(f"{state.why}: tries {len(tuning.contenders)} plans again")
    state, done = _follow(replace(state, before=before, is_preparing=False), tuning, actions)
    return state, (said, *done)


def _workers(state: State, index: int) -> int:
    return len(state.tuning.candidates[index].plan.workers)


def _patience_s(doublings: int) -> float:
    return COOL_DOWN_S * 2.0**doublings
