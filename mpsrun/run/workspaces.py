"""Workspaces of cuBLAS for recordings, in memory that stays theirs.

Torch has one for each cuBLAS handle and stream. What is recorded works in the one that its stream has, in every replay,
and torch may free it before: Inductor's graphs clear all that there are, and torch from 2.12 on frees that of a stream
with the first graph that was recorded on it. Those of our streams therefore come from a pool of memory that serves
nothing else, and stays. Those of other streams are left alone: graphs of the script may work in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

Stream = torch.cuda.Stream


class Workspaces:
    """Those of one device; not safe for threads.

    All recordings of a device share them, since their replays follow each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        self._needing: list[Stream] = []

    def provide(self, main: Stream, sides: Iterable[tuple[Stream, Stream]]) -> None:
        """Have those that recordings of the calling thread need, whose current device this is.

        main: the stream of recordings. sides: of each lane, the stream that runs op by op, and the one that is recorded
        in its place, which needs a workspace if the former has one.
        """
        if torch.cuda.get_allocator_backend() != "native":  # others have no pools
            return
        pool = self._pool = self._pool or torch.cuda.MemPool()
        if main not in self._needing:
            self._needing.append(main)
        self._take(pool)
        unsure = [(plain, recorded) for plain, recorded in sides if recorded not in self._needing]
        if unsure:
            size_bytes = max((size for _, size in _in_use(pool.snapshot())), default=0)
            having = _in_use(torch.cuda.memory_snapshot()) if size_bytes else set()
            self._needing += [recorded for plain, recorded in unsure if (plain.cuda_stream, size_bytes) in having]
            self._take(pool)

    def _take(self, pool: torch.cuda.MemPool) -> None:
        """Where a stream has one already, this takes a microsecond."""
        with torch.cuda.use_mem_pool(pool, self._device):
            for stream in self._needing:
                with torch.cuda.stream(stream):
                    torch.cuda.current_blas_handle()  # which has a workspace then


def _in_use(segments: Sequence[dict[str, Any]]) -> set[tuple[int, int]]:
    """(stream, bytes) of what is allocated there."""
    return {
        (segment["stream"], block["requested_size"])
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
