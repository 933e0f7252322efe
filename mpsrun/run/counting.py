"""Counters that a recorded forward moves on in one op at its end: each would be a kernel more in the way of its branch.

Only in recordings, whose replays do not end in the middle: of a forward that raises, plain PyTorch has counted a part.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _Local(threading.local):
    waiting: dict[int, list[Tensor]] | None = None  # by step


_local = _Local()


@contextlib.contextmanager
def gathered() -> Iterator[None]:
    """Counters that are moved on under this are so at its end."""
    waiting = _local.waiting = {}
    try:
        yield
        for step, counters in waiting.items():
            torch._foreach_add_(counters, step)
    finally:
        _local.waiting = None


def count(counter: Tensor, step: int) -> None:
    """`counter.add_(step)`, now or at the end of what is recorded."""
    if _local.waiting is None:
        counter.add_(step)
    else:
        _local.waiting.setdefault(step, []).append(counter)
