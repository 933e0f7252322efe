"""Slots: room for the tensors of one invocation, taken from large shared chunks and used again and again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mpsrun.device.base import Chunk, ChunkHandle, Device, TensorRef, typed_view

ALIGN_BYTES = 512
MIN_CHUNK_BYTES = 16 << 20
MAX_VIEWS = 256


@dataclass(eq=False)
class Room:
    """A slot of the arena. `pending`: (counter, value) pairs which must be reached before it is written again."""

    chunk: Chunk
    offset_bytes: int
    size_bytes: int
    pending: list[tuple[int, int]] = field(default_factory=list)
    views: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)

    def tensors(self, layout: int, part: str, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """The tensors of one part of a layout, made once for each slot and kept."""
        key = (layout, part)
        views = self.views.get(key)
        if views is None:
            if len(self.views) >= MAX_VIEWS:
                self.views.clear()
            views = self.views[key] = [slot_view(self.chunk, self.offset_bytes, ref) for ref in refs]
        return views


def slot_view(chunk: Chunk, offset_bytes: int, ref: TensorRef) -> torch.Tensor:
    """The tensor at `ref`, whose offset counts from a slot that starts at `offset_bytes` of the chunk."""
    moved = TensorRef(chunk.id, offset_bytes + ref.offset_bytes, ref.shape, ref.stride, ref.dtype)
    return typed_view(chunk, moved)


class Arena:
    """Hands out slots by size class and stream; once warm it allocates nothing.

    A slot that was given back on a stream is handed out again on that stream only, since the order of a stream is
    what separates its old readers from its new writer.
    """

    def __init__(self, device: Device, announce: Callable[[ChunkHandle], None]) -> None:
        self._device = device
        self._announce = announce
        self._free: defaultdict[tuple[int, int], list[Room]] = defaultdict(list)
        self._chunk: Chunk | None = None
        self._used_bytes = 0
        self.chunks: dict[int, Chunk] = {}
        self.in_use = 0

    def take(self, size_bytes: int) -> Room:
        """A slot of at least this size, for the current stream."""
        size_bytes = size_class(size_bytes)
        free = self._free[self._device.stream_key(), size_bytes]
        room = free.pop() if free else self._carve(size_bytes)
        self.in_use += 1
        return room

    def give_back(self, room: Room, stream: int, pending: Sequence[tuple[int, int]] = ()) -> None:
        """Return a slot; whoever takes it next waits for `pending` first."""
        room.pending = list(pending)
        self._free[stream, room.size_bytes].append(room)
        self.in_use -= 1

    def _carve(self, size_bytes: int) -> Room:
        if self._chunk is None or self._used_bytes + size_bytes > self._chunk.handle.size_bytes:
            self._chunk = self._device.new_chunk(max(MIN_CHUNK_BYTES, size_bytes))
            self._used_bytes = 0
            self.chunks[self._chunk.id] = self._chunk
            self._announce(self._chunk.handle)
        room = Room(self._chunk, self._used_bytes, size_bytes)
        self._used_bytes += size_bytes
        return room

    def close(self) -> None:
        """Free every chunk. The processes that mapped them must have ended before: CUDA IPC asks for it."""
        self._free.clear()
        self._chunk = None
        for chunk in self.chunks.values():
            self._device.close_chunk(chunk)
        self.chunks.clear()


def size_class(size_bytes: int) -> int:
    """Round up to an eighth of a power of two, so that slots of similar size serve each other (at most 14 % lost)."""
    step = max(ALIGN_BYTES, 1 << max(0, size_bytes.bit_length() - 4))
    return max(ALIGN_BYTES, -(-size_bytes // step) * step)
