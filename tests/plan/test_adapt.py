"""Plans that follow the load: what each load leads to, and what holds whatever happens."""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from made import PATIENT, contenders

from mpsrun.monitor import trace
from mpsrun.monitor.sample import Sample
from mpsrun.plan import adapt, tuner
from mpsrun.plan.load import Held, Load, Reading, Watched
from mpsrun.run.eyes import reading_of

QUIET = Reading(tenants=frozenset(), tenants_mib=0, slowed_by=(), free_mib=40_000, total_mib=80_000, sm_percent=50.0)
TENANT = replace(QUIET, tenants=frozenset({77}), tenants_mib=2048)
SERIAL, STREAMS, WORKERS = 0, 1, 2
MS = {SERIAL: 40.0, STREAMS: 30.0, WORKERS: 20.0}  # when it is quiet
MS_BESIDE_A_TENANT = {SERIAL: 50.0, STREAMS: 45.0, WORKERS: 80.0}
PREPARING_STEPS = 4
TRACES = Path(__file__).parent / "traces"


@dataclass
class Simulation:
    """Steps whose times the test decides; `lines` has every decision with its time in seconds."""

    ms: dict[int, float] = field(default_factory=lambda: dict(MS))
    reading: Reading | None = QUIET
    noise: float = 0.01
    now_s: float = 100.0
    candidates: Sequence = field(default_factory=lambda: contenders((-1,), (1, 2)))
    lines: list[tuple[float, str]] = field(default_factory=list)
    changes: list[tuple[float, float]] = field(default_factory=list)  # when each began and ended
    forced: bool = False  # the change under way is none of the adaptation's own

    def __post_init__(self) -> None:
        self.rng = random.Random(7)
        self.prepared_in: int | None = None
        self.state, actions = adapt.start(self.candidates)
        self.trying_since: float | None = None
        self.act(actions)

    def act(self, actions: adapt.Actions) -> None:
        for action in actions:
            match action:
                case tuner.Decided():
                    self.lines.append((self.now_s, action.reason))
                    begin = self.trying_since if self.trying_since is not None else self.now_s
                    if not self.forced:
                        self.changes.append((begin, self.now_s))
                    self.trying_since = None
                case tuner.Log() | adapt.Tell():
                    self.lines.append((self.now_s, action.line))

    def feed(self, event: adapt.Event) -> None:
        was_decided = self.state.decided is not None
        was_preparing = self.state.is_preparing
        self.state, actions = adapt.advance(self.state, event)
        if self.state.is_preparing and not was_preparing:
            self.prepared_in = PREPARING_STEPS
        if was_decided and self.state.decided is None:
            self.trying_since = self.now_s
        self.act(actions)

    def step(self) -> None:
        self.feed(adapt.Now(self.now_s, self.reading))
        if self.prepared_in is not None:
            self.prepared_in -= 1
            if self.prepared_in == 0:
                self.prepared_in = None
                self.feed(adapt.Prepared())
        current = self.state.current
        ms = self.ms[current] * self.rng.gauss(1.0, self.noise)
        self.now_s += ms / 1000
        self.feed(tuner.StepTimed(current, ms * 1000))

    def run(self, seconds: float) -> "Simulation":
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.step()
        return self

    def decisions_since(self, begin_s: float) -> list[str]:
        return [line for at_s, line in self.lines if at_s >= begin_s]

    def plan(self) -> int | None:
        return self.state.decided


def settled() -> Simulation:
    simulation = Simulation().run(15)
    assert simulation.plan() == WORKERS
    return simulation


def test_a_quiet_run_never_changes_its_plan() -> None:
    simulation = settled()
    begin = simulation.now_s
    simulation.run(300)
    assert (simulation.plan(), simulation.decisions_since(begin)) == (WORKERS, [])


def test_a_tenant_comes_and_goes() -> None:
    simulation = settled()
    begin = simulation.now_s
    simulation.reading, simulation.ms = TENANT, dict(MS_BESIDE_A_TENANT)
    simulation.run(10)
    assert simulation.plan() == STREAMS
    said = simulation.decisions_since(begin)
    assert "another process on the GPU (pid 77, 2048 MiB): tries 3 plans again" in said
    assert said[-1].startswith("keeps plan 1: 4")
    begin = simulation.now_s
    simulation.reading, simulation.ms = QUIET, dict(MS)
    simulation.run(20)
    assert simulation.plan() == WORKERS
    assert simulation.decisions_since(begin) == ["process 77 left the GPU: back to plan 2"]


class Replay(Simulation):
    """Steps under what NVML told on an H100 while another process came and went, every sample at its time."""

    def follow(self, name: str, ms_by_load: Callable[[Sample], dict[int, float]]) -> "Replay":
        begin_s = self.now_s
        samples = trace.samples(trace.read(TRACES / f"{name}.jsonl"))
        self.seen: list[tuple[float, int | None, Sample]] = []
        for sample in samples:
            self.reading, self.ms = reading_of(sample), ms_by_load(sample)
            self.step()
            self.reading = None
            while self.now_s < begin_s + sample.at_s - samples[0].at_s:
                self.step()
            self.seen.append((self.now_s, self.plan(), sample))
        return self

    def times_of(self, is_there: Callable[[Sample], bool]) -> tuple[float, float]:
        """When the other process was first seen, and when it was no longer seen."""
        there = [at_s for at_s, _, sample in self.seen if is_there(sample)]
        return there[0], there[-1]


def has_tenant(sample: Sample) -> bool:
    return bool(sample.tenants)


@pytest.mark.parametrize("name", ["client", "outside", "uncaptured"])
def test_a_recorded_tenant_is_followed(name: str) -> None:
    """Another plan within ten seconds of its coming, the first one again within twenty of its leaving."""
    replay = Replay().follow(name, lambda sample: dict(MS_BESIDE_A_TENANT if has_tenant(sample) else MS))
    came_s, left_s = replay.times_of(has_tenant)
    assert {plan for at_s, plan, _ in replay.seen if came_s - 5 < at_s < came_s} == {WORKERS}
    assert {plan for at_s, plan, _ in replay.seen if came_s + 10 < at_s < left_s} == {STREAMS}
    assert {plan for at_s, plan, _ in replay.seen if at_s > left_s + 20} == {WORKERS}
    decided = [line for at_s, line in replay.lines if at_s > came_s and ("keeps" in line or "back to" in line)]
    assert len(decided) <= 4


@pytest.mark.parametrize("name", ["client", "outside"])
def test_a_recorded_tenant_that_changes_nothing_costs_one_trial(name: str) -> None:
    """As it was when this was recorded: the plan at hand was the fastest one beside the tenant, too."""
    slower = {plan: 4 * ms for plan, ms in MS.items()}
    replay = Replay().follow(name, lambda sample: slower if has_tenant(sample) else dict(MS))
    came_s, _ = replay.times_of(has_tenant)
    assert {plan for at_s, plan, _ in replay.seen if at_s > came_s and plan is not None} == {WORKERS}
    assert len([line for at_s, line in replay.lines if at_s > came_s and "tries" in line]) == 1


def test_a_recorded_load_under_which_another_plan_is_faster() -> None:
    """Step times are those of the trace, too: the plan changes within ten seconds, and back within twenty."""
    lines = list(trace.read(TRACES / "cached.jsonl"))
    loaded = [sample.at_s for sample in trace.samples(lines) if is_loaded(sample)]
    plans = {"serial": SERIAL, "captured": STREAMS, "captured streams": WORKERS}
    alone: dict[int, list[float]] = {plan: [] for plan in plans.values()}
    beside: dict[int, list[float]] = {plan: [] for plan in plans.values()}
    for line in lines:
        if isinstance(line, trace.Stepped):
            if loaded[0] + 1.0 < line.at_s < loaded[-1]:  # before it computes, it is only there
                beside[plans[line.plan]].append(line.us / 1000)
            elif not loaded[0] < line.at_s < loaded[-1] + 1.0:
                alone[plans[line.plan]].append(line.us / 1000)
    quiet_ms, load_ms = ({plan: median(ms) for plan, ms in times.items()} for times in (alone, beside))
    assert load_ms[WORKERS] < 0.9 * load_ms[STREAMS]
    replay = Replay(ms=dict(quiet_ms)).follow("cached", lambda s: dict(load_ms if is_loaded(s) else quiet_ms))
    came_s, left_s = replay.times_of(is_loaded)
    assert {plan for at_s, plan, _ in replay.seen if came_s - 5 < at_s < came_s} == {STREAMS}
    assert {plan for at_s, plan, _ in replay.seen if came_s + 10 < at_s < left_s} == {WORKERS}
    assert {plan for at_s, plan, _ in replay.seen if at_s > left_s + 20} == {STREAMS}


def is_loaded(sample: Sample) -> bool:
    """In the trace there is an idle process on the GPU all the time."""
    return len(sample.tenants) > 1


def test_a_recorded_memory_hog_takes_the_workers() -> None:
    replay = Replay().follow("memory", lambda _: dict(MS))
    came_s, left_s = replay.times_of(lambda sample: bool(sample.tenants and (sample.tenants[0].memory_mib or 0) > 7e4))
    assert {plan for at_s, plan, _ in replay.seen if came_s + 3 < at_s < left_s} == {STREAMS}
    assert {plan for at_s, plan, _ in replay.seen if at_s > left_s + 20} == {WORKERS}


def test_without_nvml_step_times_alone_do_it() -> None:
    simulation = Simulation(reading=None).run(15)
    begin = simulation.now_s
    simulation.ms = dict(MS_BESIDE_A_TENANT)
    simulation.run(15)
    assert simulation.plan() == STREAMS
    assert re.match(r"steps take (79|80)\.\d\d ms instead of (19|20)\.\d\d ms", simulation.decisions_since(begin)[0])
    simulation.ms = dict(MS)
    simulation.run(20)
    assert simulation.plan() == WORKERS


def test_a_load_that_ends_without_a_trace_is_found_by_looking_again() -> None:
    simulation = Simulation(reading=None).run(15)
    simulation.ms = {SERIAL: 40.0, STREAMS: 90.0, WORKERS: 95.0}
    simulation.run(15)
    assert simulation.plan() == SERIAL
    simulation.ms = dict(MS)  # a serial step takes as long as before
    simulation.run(90)
    assert simulation.plan() == WORKERS


def test_less_than_ten_percent_is_no_drift() -> None:
    simulation = settled()
    begin = simulation.now_s
    simulation.ms = {index: ms * 1.07 for index, ms in MS.items()}
    simulation.run(60)
    assert simulation.decisions_since(begin) == []


def test_the_same_plan_again_and_again_is_asked_for_less_and_less() -> None:
    simulation = settled()
    begin = simulation.now_s
    for turn in range(40):
        simulation.ms = {index: ms * (1.3 if turn % 2 else 1.0) for index, ms in MS.items()}
        simulation.run(20)
    assert simulation.plan() == WORKERS
    tries = [line for line in simulation.decisions_since(begin) if "tries" in line]
    assert 3 <= len(tries) <= 20


def test_heat_is_a_reason_once_it_lasts() -> None:
    simulation = settled()
    begin = simulation.now_s
    hot = replace(QUIET, slowed_by=("heat (driver)",))
    for turn in range(100):  # on and off, as a power cap is
        simulation.reading = hot if turn % 2 else QUIET
        simulation.run(0.3)
    assert simulation.decisions_since(begin) == []
    simulation.reading = hot
    simulation.run(15)
    assert "clocks lowered by heat (driver): tries 3 plans again" in simulation.decisions_since(begin)


def test_a_full_gpu_goes_back_to_serial_if_that_is_no_slower() -> None:
    simulation = settled()
    simulation.reading = replace(QUIET, sm_percent=99.0, dram_percent=97.0)
    simulation.ms = {SERIAL: 40.0, STREAMS: 41.0, WORKERS: 42.0}
    begin = simulation.now_s
    simulation.run(15)
    assert simulation.plan() == SERIAL
    assert "the GPU is full (SMs 99 %, DRAM 97 %): tries 3 plans again" in simulation.decisions_since(begin)


def test_short_memory_takes_fewer_workers_at_once_and_tries_nothing() -> None:
    simulation = Simulation(candidates=contenders((-1,), (1, 2), (1, 2, 3)), ms={0: 40.0, 1: 30.0, 2: 22.0, 3: 20.0})
    simulation.run(20)
    assert simulation.plan() == 3
    begin = simulation.now_s
    simulation.reading = replace(QUIET, free_mib=900)
    simulation.run(1)
    line = "memory is short (900 of 80000 MiB free): takes plan 2, with 2 instead of 3 workers"
    assert simulation.decisions_since(begin) == [line]
    simulation.reading = replace(QUIET, free_mib=4_000)  # between the limits
    simulation.run(30)
    assert simulation.plan() == 2
    simulation.reading = QUIET
    simulation.run(30)
    assert simulation.plan() == 3


def test_short_memory_ends_preparations_and_trials() -> None:
    for wanted in ("preparing", "trying"):
        simulation = settled()
        simulation.reading, simulation.ms = TENANT, dict(MS_BESIDE_A_TENANT)
        while not (simulation.state.is_preparing if wanted == "preparing" else simulation.plan() is None):
            simulation.step()
        simulation.reading = replace(TENANT, free_mib=900)
        simulation.run(1.0)
        assert simulation.plan() is not None
        assert not simulation.state.is_preparing
        simulation.run(6)
        assert simulation.plan() in (SERIAL, STREAMS)
        begin = simulation.now_s
        simulation.run(60)
        assert simulation.decisions_since(begin) == [], "nothing is tried while memory is short"


def test_what_was_lost_is_not_gone_back_to() -> None:
    simulation = settled()
    simulation.forced = True
    simulation.feed(tuner.WorkerLost(2))
    assert simulation.plan() == STREAMS
    simulation.forced = False
    simulation.reading, simulation.ms = TENANT, dict(MS_BESIDE_A_TENANT)
    simulation.run(20)
    simulation.reading, simulation.ms = QUIET, dict(MS)
    simulation.run(40)
    assert simulation.plan() == STREAMS


def test_workers_that_are_busy_do_not_hold_it_up() -> None:
    simulation = settled()
    simulation.reading = TENANT
    begin = simulation.now_s
    while not simulation.state.is_preparing:
        simulation.step()
    simulation.prepared_in = None  # nobody gets ready
    simulation.run(adapt.PREPARE_S + 1)
    assert not simulation.state.is_preparing or simulation.now_s - begin > adapt.PREPARE_S
    assert simulation.plan() == WORKERS


def test_who_was_there_from_the_start_is_no_news() -> None:
    """Also where processes have other numbers to NVML than to us, as in a container."""
    simulation = Simulation(reading=None).run(4)
    assert simulation.plan() == WORKERS
    simulation.reading = TENANT  # the monitor was late
    begin = simulation.now_s
    simulation.run(60)
    assert simulation.decisions_since(begin) == []


def test_a_plan_from_a_cache_is_watched_too() -> None:
    simulation = Simulation()
    simulation.state = adapt.settled(simulation.candidates, WORKERS)
    simulation.run(10)
    simulation.reading, simulation.ms = TENANT, dict(MS_BESIDE_A_TENANT)
    simulation.run(10)
    assert simulation.plan() == STREAMS


# --- readings that flicker


def test_a_state_counts_once_it_has_held() -> None:
    held = Held(value=False, other=False)
    seen = [(0, 1, 0), (0.9, 1, 0), (1.0, 0, 0), (1.1, 1, 0), (2.0, 1, 0), (2.1, 1, 1), (2.2, 0, 1), (3.3, 0, 0)]
    for now_s, found, wanted in seen:
        held = held.seen(bool(found), now_s, 1.0)
        assert held.value == wanted, now_s


def test_what_is_not_known_is_no_load() -> None:
    watched = Watched()
    for now_s in range(10):
        watched = watched.seen(Reading(), float(now_s))
    assert watched.load == Load()


def test_memory_and_saturation_have_two_limits() -> None:
    watched = Watched()
    for now_s, free_mib, sm, tight, busy in [
        (0.0, 5_000, 90.0, False, False),  # the first one counts at once, all others once they have held
        (5.0, 2_000, 97.0, False, False),
        (10.0, 2_000, 97.0, True, True),
        (15.0, 5_000, 90.0, True, True),
        (20.0, 5_000, 90.0, True, True),
        (25.0, 7_000, 80.0, True, True),
        (30.0, 7_000, 80.0, False, False),
    ]:
        watched = watched.seen(replace(QUIET, free_mib=free_mib, sm_percent=sm), now_s)
        assert (watched.load.tight, watched.load.busy) == (tight, busy), now_s


# --- whatever happens


class AnyLoad(RuleBasedStateMachine):
    """Loads come and go in any order; steps take what the load at hand makes of each plan."""

    @initialize(best=st.sampled_from([STREAMS, WORKERS]), has_nvml=st.booleans())
    def begin(self, best: int, has_nvml: bool) -> None:
        quiet = {SERIAL: 220.0, STREAMS: 200.0, WORKERS: 190.0, best: 100.0}
        self.quiet = quiet
        self.has_nvml = has_nvml
        self.tenants: frozenset[int] = frozenset()
        self.hot = self.tight = self.full = False
        self.hidden = 1.0
        self.lost = False
        self.simulation = Simulation(ms=dict(quiet), reading=QUIET if has_nvml else None, noise=0.005)
        self.simulation.run(40)

    def apply(self) -> None:
        loaded = bool(self.tenants) or self.full
        factor = {SERIAL: 1.2, STREAMS: 2.5, WORKERS: 3.0} if loaded else dict.fromkeys(MS, 1.0)
        clock = (1.2 if self.hot else 1.0) * self.hidden
        self.simulation.ms = {index: ms * factor[index] * clock for index, ms in self.quiet.items()}
        if self.has_nvml:
            self.simulation.reading = replace(
                QUIET,
                tenants=self.tenants,
                slowed_by=("power cap",) if self.hot else (),
                free_mib=500 if self.tight else 40_000,
                sm_percent=99.0 if self.full else 50.0,
            )

    @rule(tenants=st.frozensets(st.integers(1, 3), max_size=2))
    def tenants_change(self, tenants: frozenset[int]) -> None:
        self.tenants = tenants
        self.apply()

    @rule(hot=st.booleans(), tight=st.booleans(), full=st.booleans())
    def conditions_change(self, hot: bool, tight: bool, full: bool) -> None:
        self.hot, self.tight, self.full = hot, tight, full
        self.apply()

    @rule(factor=st.sampled_from([1.0, 1.3, 2.0]))
    def everything_slows(self, factor: float) -> None:
        self.hidden = factor
        self.apply()

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.simulation.run(seconds)

    @rule()
    def worker_is_lost(self) -> None:
        self.lost = True
        self.simulation.forced = True
        self.simulation.feed(tuner.WorkerLost(1))
        self.simulation.forced = False

    @invariant()
    def never_faster_than_the_cool_down(self) -> None:
        changes = self.simulation.changes if hasattr(self, "simulation") else []
        for (_, end), (begin, _) in itertools.pairwise(changes):
            assert begin - end >= adapt.COOL_DOWN_S - 1e-6

    @invariant()
    def never_runs_what_is_lost(self) -> None:
        if hasattr(self, "simulation") and self.lost:
            assert self.simulation.state.current != WORKERS

    def teardown(self) -> None:
        """Once all is quiet the best plan comes back."""
        if not hasattr(self, "simulation"):
            return
        self.tenants, self.hot, self.tight, self.full, self.hidden = frozenset(), False, False, False, 1.0
        self.apply()
        able = {index: ms for index, ms in self.quiet.items() if not (self.lost and index == WORKERS)}
        deadline_s = self.simulation.now_s + 6000
        while self.simulation.plan() != min(able, key=able.__getitem__) and self.simulation.now_s < deadline_s:
            self.simulation.run(10)
        assert self.simulation.plan() == min(able, key=able.__getitem__), self.simulation.lines[-5:]
        self.never_faster_than_the_cool_down()


AnyLoad.TestCase.settings = settings(PATIENT, max_examples=100, stateful_step_count=25)
TestAnyLoad = AnyLoad.TestCase
