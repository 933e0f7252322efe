"""Tuning and adaptation at their edge: steps are timed, candidates take turns, and decisions are told."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from mpsrun import log
from mpsrun.plan import adapt, tuner
from mpsrun.plan.candidates import Candidate
from mpsrun.run.eyes import eyes
from mpsrun.run.stepclock import StepClock

# A network that tunes and was not called for so many calls of others lets another one tune.
MOST_ABSENT_CALLS = 64

_turn = threading.Lock()
_tuning: weakref.ref[Tuning] | None = None  # one at a time: two would measure each other


class Tuning:
    """Which candidate each call of a graph runs under: until one is decided on, and when that is no longer the best.

    decided: called with the candidate's index when that is known, and again where it had to change. can_run: whether
    all candidates that were made are ready.
    """

    def __init__(
        self,
        name: str,
        candidates: Sequence[Candidate],
        kind: str,
        decided: Callable[[int], None],
        can_run: Callable[[], bool],
    ) -> None:
        self.candidates = tuple(candidates)
        self._name = name
        self._decided = decided
        self._can_run = can_run
        self._clock = StepClock(kind)
        self._eyes = eyes(kind)
        self._advancing = threading.RLock()  # several threads may call one network
        self._seen = 0  # samples
        self._state: adapt.State | None = None
        self._lost: set[int] = set()
        self._ruled_out: set[int] = set()  # candidates
        self._last_call = 0
        self._last_step = 0
        self._gap = 0

    @property
    def is_decided(self) -> bool:
        return self.decided is not None

    @property
    def decided(self) -> int | None:
        """The candidate that was decided on."""
        return self._state.decided if self._state is not None else None

    @property
    def is_home(self) -> bool:
        """Whether that is the best without the loads of others, and not only for the time being."""
        return self._state is not None and self._state.decided == self._state.home

    @property
    def kept(self) -> frozenset[int]:
        """The candidates that should stay ready."""
        return self._state.kept if self._state is not None else frozenset()

    @property
    def wants_candidates(self) -> bool:
        """Whether all of them are to be made ready for another trial, while steps go on; `prepared` says they are."""
        return self._state is not None and self._state.is_preparing

    @property
    def is_short_of_memory(self) -> bool:
        return self._state is not None and self._state.under.tight

    @property
    def medians_us(self) -> dict[str, float]:
        """By candidate, the median step of those that were timed."""
        return tuner.medians_us(self._state.tuning) if self._state is not None else {}

    def settle(self, chosen: int) -> None:
        """Start with what was decided in an earlier run."""
        self._state = adapt.settled(self.candidates, chosen)

    def may_start(self, calls: int) -> bool:
        """Whether it is this one's turn; `calls` counts the calls of all graphs."""
        global _tuning
        with _turn:
            other = _tuning() if _tuning is not None else None
            if other is None or other.is_decided or calls - other._last_call > MOST_ABSENT_CALLS:
                _tuning, other = weakref.ref(self), self  # a network that is dropped must not leave its recordings here
            self._last_call = calls
            return other is self

    def prepared(self) -> None:
        """All candidates were made: they take turns again once they can run; until then the plan stays."""
        if self._can_run():
            self._advance(adapt.Prepared())

    def pause(self) -> None:
        """The call that begins now runs plain; what it and the one before it take is not compared."""
        self._clock.interrupt()

    def no_memory(self, candidate: int) -> None:
        """A worker had no memory for a candidate that was to be tried."""
        self._rule_out(tuner.OutOfMemory(candidate))

    def not_captured(self, candidate: int) -> None:
        """A candidate that was to be tried cannot be captured."""
        self._rule_out(tuner.NotCaptured(candidate))

    def _rule_out(self, event: tuner.OutOfMemory | tuner.NotCaptured) -> None:
        if not self.is_decided and event.candidate not in self._ruled_out:
            self._ruled_out.add(event.candidate)
            self._clock.interrupt()
            self._start()
            self._advance(event)

    def _start(self) -> None:
        if self._state is None:
            self._state, actions = adapt.start(self.candidates)
            self._act(actions)

    def step(self, calls: int, lost: Sequence[int]) -> int:
        """The candidate for the call that begins now; `lost`: the workers that are gone for good."""
        self._last_call = calls
        self._start()
        assert self._state is not None, "it was started"
        for worker in [worker for worker in lost if worker not in self._lost]:
            self._lost.add(worker)
            self._advance(tuner.WorkerLost(worker))
        if not self._is_timing or self._clock.is_amid():
            return self._state.current
        if self.is_decided:
            self._compare_alike(calls)
        self._look()
        current = self._state.current
        if self._is_timing:
            self._clock.start(current)
        return current

    def called(self, results: Sequence[Any]) -> None:
        """The call of the last `step` has ended with these results."""
        if self._is_timing:
            self._clock.called(results)

    @property
    def _is_timing(self) -> bool:
        return not self.is_decided or self._is_watching

    def tend(self) -> None:
        """Look at the load between calls, which may belong to others."""
        if self.is_decided and self._eyes.adapts:
            self._look()

    @property
    def is_plain(self) -> bool:
        """Whether the plain run was decided on, and nothing else is to be tried."""
        decided = self.decided
        return decided is not None and self.candidates[decided].plan.is_serial and not self.wants_candidates

    @property
    def needs_calls(self) -> bool:
        """Whether a plan that is not plain was decided on, or plans are to be tried again; not while first tried."""
        if self._state is None or (self._state.decided is None and self._state.before is None):
            return False
        return not self.is_plain

    @property
    def _is_watching(self) -> bool:
        return self._eyes.adapts or self._eyes.is_tracing

    def _look(self) -> None:
        """Take in the steps that have ended, and what the monitor saw."""
        if not self.is_decided:
            self._clock.catch_up()
        for candidate, us in self._clock.periods():
            self._eyes.stepped(self._name, self.candidates[candidate].name, us)
            self._advance(tuner.StepTimed(candidate, us))
        if self._eyes.adapts:
            now, self._seen = self._eyes.now(self._seen)
            self._advance(now)

    def _compare_alike(self, calls: int) -> None:
        """Time only steps with as many calls of other networks as the one before: between others is an evaluation."""
        gap, self._last_step = calls - self._last_step, calls
        if gap != self._gap:
            self._gap = gap
            self._clock.interrupt()

    def _advance(self, event: adapt.Event) -> None:
        assert self._state is not None, "events come after the start"
        with self._advancing:
            self._state, actions = adapt.advance(self._state, event)
            self._act(actions)

    def _act(self, actions: adapt.Actions) -> None:
        for action in actions:
            match action:
                case tuner.Decided():
                    log.say(f"{self._name}: {action.reason}")
                    self._eyes.decided(self._name, self.candidates[action.candidate].name, action.reason)
                    self._decided(action.candidate)
                case adapt.Tell():
                    log.say(f"{self._name}: {action.line}")
                case tuner.Log():
                    log.detail(f"{self._name}: {action.line}")
