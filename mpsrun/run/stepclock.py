"""How long a script's own steps take: from a call of a network to the first one after a backward.

Several calls before one backward, as of an encoder for both of two views, are one step.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Period = tuple[int, float]  # under which candidate, and microseconds

MOST_AHEAD = 2  # steps that are launched and not through when another one begins, while plans are compared
MOST_CALLS = 256  # in one step; of a script that asks for no backward after these each call is a step
NAP_S = 1e-4
CATCH_UP_S = 30.0


class StepClock:
    """Marks the starts of steps. On a GPU with events, which are read once they are through: nobody waits."""

    def __init__(self, kind: str) -> None:
        self._is_cuda = kind == "cuda"
        self._last: tuple[int, Any] | None = None
        self._open: deque[tuple[int, Any, Any]] = deque()
        self._taking = threading.Lock()  # several threads may call one network
        self._calls = 0
        self._pending: Callable[[], _Pending | None] = lambda: None
        self._hooks: list[Any] = []

    def is_amid(self) -> bool:
        """Whether the call that begins now belongs to the step before: the backward of its last call is yet to come."""
        pending = self._pending()
        return pending is not None and not pending.came

    def called(self, results: Sequence[Any]) -> None:
        """A call has ended with these results."""
        if self._calls > MOST_CALLS:
            return
        self._calls += 1
        if self._calls > MOST_CALLS:
            self._pending = lambda: None
            return
        for handle in self._hooks:  # a network may return what outlives the step
            handle.remove()
        pending = _Pending()
        nodes = [result.grad_fn for result in results if isinstance(result, torch.Tensor)]
        self._hooks = [node.register_prehook(pending) for node in nodes if node is not None]
        self._pending = weakref.ref(pending)  # gone with the graph, or at once where nothing has a gradient

    def start(self, candidate: int) -> None:
        """A step begins, which runs under this candidate."""
        if self._calls <= MOST_CALLS:
            self._calls = 0
        now: Any = time.perf_counter()
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        if self._last is not None:
            self._open.append((*self._last, now))
        self._last = candidate, now

    def interrupt(self) -> None:
        """The step that is under way is not to be timed, nor is what comes before the next start."""
        self._last = None

    def catch_up(self) -> None:
        """Let the device come up to the launching thread, but for a few steps that it then has to do.

        Where steps take the GPU longer than their launch, dozens of one plan would be under way before the first is
        timed. Gives up after `CATCH_UP_S`.
        """
        with self._taking:
            if not self._is_cuda or len(self._open) < MOST_AHEAD:
                return
            begun = self._open[-MOST_AHEAD][2]
        deadline_s = time.monotonic() + CATCH_UP_S
        while not begun.query() and time.monotonic() < deadline_s:
            time.sleep(NAP_S)

    def periods(self) -> list[Period]:
        """The steps that have ended and were not told before."""
        found: list[Period] = []
        with self._taking:
            while self._open and (not self._is_cuda or self._open[0][2].query()):
                candidate, start, end = self._open.popleft()
                found.append((candidate, start.elapsed_time(end) * 1e3 if self._is_cuda else (end - start) * 1e6))
        return found


class _Pending:
    """A backward that is yet to come, as a hook of the graph that it goes through."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _gradients: object) -> None:
        self.came = True
