"""What lead and workers need of a device: shared chunks of memory, and counters that order their use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch

COUNTER_STRIDE_BYTES = 64  # one counter a cache line
MAX_COUNTERS = 1024  # two a worker, and a worker that is started again gets new ones
COUNTER_BYTES = MAX_COUNTERS * COUNTER_STRIDE_BYTES


class ChunkHandle(msgspec.Struct, frozen=True):
    """Names one chunk to another process.

    `token` is what the device needs to map it: the path of a file descriptor on CPU, a CUDA IPC handle on a GPU.
    """

    id: int
    size_bytes: int
    token: bytes


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """A tensor inside a chunk: where it starts (bytes), its shape and strides (elements), its dtype by name."""

    chunk: int
    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(eq=False)
class Chunk:
    """A piece of memory mapped into this process as one flat uint8 tensor; unmapped when `close` is called."""

    handle: ChunkHandle
    memory: torch.Tensor
    owner: Any = None

    @property
    def id(self) -> int:
        return self.handle.id


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype inside torch, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def typed_view(chunk: Chunk, ref: TensorRef) -> torch.Tensor:
    """The tensor that `ref` describes, on the chunk's memory.

    It is no view of another tensor as far as autograd is concerned, so that it may be written in place wherever a
    fresh tensor may.
    """
    dtype = getattr(torch, ref.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected the name of a torch dtype, found {ref.dtype!r}")
    span = 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
    size = 0 if 0 in ref.shape else span * dtype.itemsize
    if ref.offset_bytes < 0 or min(ref.stride, default=0) < 0 or ref.offset_bytes + size > chunk.handle.size_bytes:
        raise ValueError(f"expected a tensor inside chunk {chunk.id} ({chunk.handle.size_bytes} bytes), found {ref}")
    if ref.offset_bytes % dtype.itemsize:
        raise ValueError(f"expected an offset aligned to {dtype.itemsize} bytes, found {ref.offset_bytes}")
    view = torch.empty(0, dtype=dtype, device=chunk.memory.device)
    return view.set_(chunk.memory.untyped_storage(), ref.offset_bytes // dtype.itemsize, ref.shape, ref.stride)  # type: ignore[call-overload]


class Device(Protocol):
    """Shared memory and order between processes on one device.

    Counters are 32-bit words in a chunk that every process maps; but for those that a replay sets back, they only grow.
    `signal` and `wait` act in the order of the current CUDA stream on a GPU, and at once on a CPU. where: the device as
    torch names it.
    """

    kind: str
    where: torch.device

    def new_chunk(self, size_bytes: int) -> Chunk:
        """A fresh, zeroed chunk, readable and writable by every process that maps its handle."""

    def open_chunk(self, handle: ChunkHandle) -> Chunk:
        """Map a chunk which another process owns. Raises `MemoryGone` where that has freed it since."""

    def close_chunk(self, chunk: Chunk) -> None:
        """Unmap (or, for the owner, free) a chunk. No tensor on it may be used afterwards."""

    def export(self, tensors: Sequence[torch.Tensor]) -> list[TensorRef]:
        """Make tensors of this process readable by others, for as long as their storages live.

        Where memory has to move it moves inside the storage, so that aliases, views and saved sizes stay as they
        were. Raises `NotShippable` where the device cannot share such memory.
        """

    def exported(self) -> dict[int, ChunkHandle]:
        """The chunks behind exported tensors, by id; one that died with its tensors is no longer listed."""

    def holds(self, chunks: Sequence[int]) -> bool:
        """Whether these exported chunks are still the memory that they were."""

    def bind_counters(self, chunk: Chunk) -> None:
        """Use this chunk's words as the counters."""

    def signal(self, counters: Sequence[int], values: Sequence[int]) -> None:
        """Set each counter to its value, after everything before it."""

    def wait(self, counters: Sequence[int], values: Sequence[int], timeout_s: float) -> None:
        """Nothing after this runs before each counter has reached its value.

        On a CPU it blocks, and raises `TimeoutError` after `timeout_s`; on a GPU it blocks the stream and returns.
        """

    def read_counters(self, wait: bool = False) -> list[int] | None:
        """The counters as they stand now, read without disturbing the streams.

        None where they are not known yet; with `wait` they are fresh, and worth a moment's wait.
        """

    def is_sound(self, timeout_s: float) -> bool:
        """Whether the device still does what this process asks of it, as far as can be told within `timeout_s`."""

    def give_back_memory(self) -> None:
        """Let other processes have the memory that this one keeps for later use."""

    def stream_key(self) -> int:
        """What order the caller is in: the handle of the current stream."""

    def follow(self, stream: int) -> None:
        """Let nothing after this run before what that stream (a `stream_key`) has been given so far."""

    def share(self, start_percent: int, percent: int) -> AbstractContextManager[None]:
        """What is submitted inside has only this part of the GPU's multiprocessors, in the same order with all else."""

    def synchronize(self) -> None:
        """Return when everything submitted by this process has been executed."""
