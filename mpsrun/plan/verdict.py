"""Which of the timed candidates is faster than which, and the lines that say so."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from mpsrun.plan.ranks import chance_of, quartiles

# A difference counts if chance makes it in one case of twenty, and if it is worth having.
ALPHA = 0.05
MIN_WIN = 0.01
# Where steps wait for the launching thread, plans that differ on the GPU look like one.
ALIKE = 0.02
# Looking after every round and stopping at the first success would find chance's; so to stop early takes more.
ALPHA_EARLY = 0.005


@dataclass(frozen=True)
class Table:
    """Names and times of the candidates, in microseconds; `serial` is the index of the plain run."""

    names: tuple[str, ...]
    times_us: tuple[tuple[float, ...], ...]
    serial: int

    def median_us(self, index: int) -> float:
        """The median step; infinite where none was timed."""
        return statistics.median(self.times_us[index]) if self.times_us[index] else float("inf")

    def low_us(self, index: int) -> float:
        """The lower quartile of its steps; infinite where none was timed.

        What disturbs a step only ever makes it longer, so that of a few steps these tell more of the plan.
        """
        return quartiles(self.times_us[index])[0] if self.times_us[index] else float("inf")

    def fastest(self, indexes: Iterable[int]) -> int:
        """The one with the shortest steps, where little disturbed them."""
        return min(indexes, key=self.low_us)

    def alike(self, index: int, others: Iterable[int]) -> list[int]:
        """Those of the others that are as fast, as far as can be told: within 2 %, and not beaten."""
        limit_us = (1 + ALIKE) * self.low_us(index)
        return [other for other in others if self.low_us(other) <= limit_us and not self.beats(index, other)]

    def beats(self, index: int, other: int, alpha: float = ALPHA) -> bool:
        """Whether a candidate is faster than another by more than the noise and by more than 1 %."""
        if not self.median_us(index) < (1 - MIN_WIN) * self.median_us(other):
            return False
        return chance_of(self.times_us[index], self.times_us[other]) <= alpha

    def surely_beats_serial(self, index: int) -> bool:
        """Whether more steps would be wasted."""
        return self.beats(index, self.serial, ALPHA_EARLY)

    def drop_line(self, index: int, best: int) -> str:
        """A candidate is out of the running."""
        return f"drops {self._told(index)} {self._against(index, best)}"

    def reason(self, chosen: int, others: Iterable[int]) -> str:
        """Why `chosen` is kept; `others`: what else could run, serial aside."""
        if chosen != self.serial:
            return f"{self._told(chosen)} {self._against(chosen, self.serial)}"
        timed = [index for index in others if self.times_us[index]]
        if not timed or not self.times_us[self.serial]:
            return f"{self.names[chosen]}: nothing else was timed that can run"
        best = self.fastest(timed)
        return f"{self._told(chosen)}; the best of the others is {self._told(best)}, {self._why_not(best)}"

    def _why_not(self, index: int) -> str:
        slower = self.median_us(index) >= self.median_us(self.serial)
        return f"{self._ratio(index, self.serial)}, {'slower' if slower else 'within the noise or 1 %'}"

    def _told(self, index: int) -> str:
        """`streams: 14.6 ms (13.9-15.1)`, the median and the quartiles."""
        low, high = quartiles(self.times_us[index])
        return f"{self.names[index]}: {_ms(self.median_us(index))} ms ({_ms(low)}-{_ms(high)})"

    def _against(self, index: int, other: int) -> str:
        return f"against {_ms(self.median_us(other))} ms {self.names[other]} ({self._ratio(index, other)})"

    def _ratio(self, index: int, other: int) -> str:
        return f"{self.median_us(other) / self.median_us(index):.2f}x"


def _ms(us: float) -> str:
    ms = us / 1000
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
