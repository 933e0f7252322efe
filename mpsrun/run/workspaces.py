"""Workspaces of cuBLAS for recordings, in memory that stays theirs.

Torch has one for each cuBLAS handle and stream. What is recorded works in the one that its stream has, in every replay,
and torch may free it before: Inductor's graphs clear all that there are, and torch from 2.12 on frees that of a stream
with the first graph that was recorded on it. Those of our streams therefore come from a pool of memory that serves
nothing else, and stays. Those of other streams are left alone: graphs of the script may work in them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

Stream = torch.cuda.Stream


class Workspaces:
    """Those of one device, which live as long as the process; for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        self._sides: list[Stream] = []  # the recorded ones that need some

    def provide(self, main: Stream, sides: Sequence[tuple[Stream, Stream]]) -> None:
        """Have those that recordings of the calling thread need, whose current device this is.

        main: the stream of recordings. sides: of each lane, the stream that runs op by op, and the one that is recorded
        in its place, which needs a workspace if the former has one.
        """
        recorded = [stream for _, stream in sides]
        if torch.cuda.get_allocator_backend() != "native":  # others have no pools, and may not tell what is in use
            _take([main, *recorded], contextlib.nullcontext())
            return
        pool = self._pool = self._pool or torch.cuda.MemPool()
        _take([main, *self._sides], torch.cuda.use_mem_pool(pool, self._device))
        if any(stream not in self._sides for stream in recorded):
            sizes = {size for _, size in _in_use(pool.snapshot())}
            in_use = _in_use(torch.cuda.memory_snapshot()) if sizes else set()
            self._sides = [
                side
                for plain, side in sides
                if side in self._sides or not sizes or any((plain.cuda_stream, size) in in_use for size in sizes)
            ]
            _take(self._sides, torch.cuda.use_mem_pool(pool, self._device))


def _take(streams: Sequence[Stream], place: contextlib.AbstractContextManager[Any]) -> None:
    """Have a workspace for each of these streams; what has none yet is taken from `place`."""
    with place:
        for stream in streams:
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


@functools.cache
def workspaces(device: torch.device) -> Workspaces:
    """Those of a device: its side streams outlive whoever records on them."""
    return Workspaces(device)
