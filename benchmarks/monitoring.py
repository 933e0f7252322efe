"""What the monitor costs a training step: with it and without it, in turns, in one run under `mpsrun`.

monitoring.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.adaptation_training import Training
from mpsrun import config
from mpsrun.monitor.page import Reader

ROUND_S = 1.5
WARM_UP_S = 20.0  # a plan is chosen meanwhile
AWAKE_S = 5.0


def times_us(step: Callable[[], None], seconds: float) -> list[float]:
    """Times of steps that follow each other, each waited for."""
    found, end_s = [], time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begin_s) * 1e6)
    return found


class Monitor:
    """The launcher's sampler, as the lead sends it to sleep and wakes it."""

    def __init__(self) -> None:
        self._settings = config.current()
        if not self._settings.watched_gpu.exists():
            sys.exit("expected a network that is tuned under mpsrun, found none; its lines say why")
        self._gpu = self._settings.watched_gpu.read_text()

    def sleep(self) -> None:
        """Take away what it samples for; it ends within a second."""
        self._settings.watched_gpu.unlink()
        self._settings.sample_page.unlink()
        time.sleep(1.0)

    def wake(self) -> float:
        """Name the GPU again; the seconds between two samples."""
        self._settings.watched_gpu.write_text(self._gpu)
        reader, times_s, end_s = Reader(self._settings.sample_page), list[float](), time.monotonic() + AWAKE_S
        while len(times_s) < 5:
            if (sample := reader.fresh()) is not None:
                times_s.append(sample.at_s)
            if time.monotonic() > end_s:
                raise TimeoutError(f"expected samples within {AWAKE_S:g} s, found {len(times_s)}")
            time.sleep(0.01)
        return (times_s[-1] - times_s[1]) / (len(times_s) - 2)


def main() -> None:
    training = Training()
    times_us(training.step, WARM_UP_S)
    monitor = Monitor()
    medians: dict[bool, list[float]] = {True: [], False: []}
    intervals_s = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        monitor.sleep()
        medians[False].append(statistics.median(times_us(training.step, ROUND_S)))
        intervals_s.append(monitor.wake())
        medians[True].append(statistics.median(times_us(training.step, ROUND_S)))
    watched, alone = (statistics.median(medians[is_watched]) for is_watched in (True, False))
    print(f"a step takes {watched:.0f} us with the monitor, {alone:.0f} us without it ({watched / alone - 1:+.2%});")
    print(f"by round, with: {spread(medians[True])}, without: {spread(medians[False])};")
    print(f"a sample every {statistics.median(intervals_s) * 1e3:.0f} ms")


def spread(values: list[float]) -> str:
    """The least and the most, in us."""
    return f"{min(values):.0f} to {max(values):.0f} us"


if __name__ == "__main__":
    main()
