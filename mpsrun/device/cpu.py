"""CPU processes: memfd chunks, and counters waited for with futexes."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mpsrun.device.base import COUNTER_STRIDE_BYTES, MAX_COUNTERS, Chunk, ChunkHandle, TensorRef, dtype_name
from mpsrun.device.futex import Futex
from mpsrun.errors import MemoryGone, MpsrunError, NotShippable

ALIGN_BYTES = 64
COUNTER_STRIDE = COUNTER_STRIDE_BYTES // 4  # in words

_DESCRIPTOR = re.compile(r"/proc/\d+/fd/\d+")
_SHARED = ("/memfd:", "/dev/shm/torch_")  # noqa: S108 - ours, and what torch itself shares
_WAIT_SLICE_S = 0.5  # how long a signal handler of Python waits for its turn at most


@dataclass(frozen=True)
class _Export:
    """Memory of this process that others may map, while `alive()`."""

    handle: ChunkHandle
    address: int
    alive: Callable[[], bool]

    def holds(self, storage: torch.UntypedStorage) -> bool:
        start = storage.data_ptr() - self.address
        return start >= 0 and start + storage.nbytes() <= self.handle.size_bytes and self.alive()


class CpuDevice:
    """Shared memory through memfd: it needs no room in /dev/shm and dies with the last process that maps it."""

    kind = "cpu"
    where = torch.device("cpu")

    def __init__(self) -> None:
        self._futex = Futex()
        self._ids = itertools.count()
        self._exports: dict[int, _Export] = {}
        self._empty: int | None = None
        self._words: ctypes.Array[ctypes.c_uint32] | None = None
        self._counters: Chunk | None = None  # what the words lie in

    def new_chunk(self, size_bytes: int) -> Chunk:
        pages, handle = self._new_pages(size_bytes)
        return Chunk(handle, torch.frombuffer(pages, dtype=torch.uint8), pages)

    def open_chunk(self, handle: ChunkHandle) -> Chunk:
        pages = open_memfd(handle.token.decode(errors="replace"), handle.size_bytes)
        return Chunk(handle, torch.frombuffer(pages, dtype=torch.uint8), pages)

    def close_chunk(self, chunk: Chunk) -> None:
        if chunk is self._counters:
            self._counters = self._words = None
        chunk.memory, chunk.owner = torch.empty(0, dtype=torch.uint8), None  # the last tensor on it unmaps it

    def _new_pages(self, size_bytes: int) -> tuple[mmap.mmap, ChunkHandle]:
        fd = os.memfd_create("mpsrun", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)  # others cannot open it through /proc anyway
        os.ftruncate(fd, size_bytes)
        pages = mmap.mmap(fd, size_bytes)
        weakref.finalize(pages, os.close, fd).atexit = False
        return pages, self._handle(fd, size_bytes)

    def _handle(self, fd: int, size_bytes: int) -> ChunkHandle:
        return ChunkHandle(next(self._ids), size_bytes, f"/proc/{os.getpid()}/fd/{fd}".encode())

    def export(self, tensors: Sequence[torch.Tensor]) -> list[TensorRef]:
        fresh: dict[int, torch.UntypedStorage] = {}
        for storage in (t.untyped_storage() for t in tensors):
            if self._find(storage) is None and storage.nbytes():
                fresh[storage.data_ptr()] = storage
        if fresh:
            self._share(list(fresh.values()))
        return [self._ref(t) for t in tensors]

    def exported(self) -> dict[int, ChunkHandle]:
        self._exports = {i: e for i, e in self._exports.items() if e.alive()}
        return {i: e.handle for i, e in self._exports.items()}

    def holds(self, chunks: Sequence[int]) -> bool:
        return all(chunk in self._exports and self._exports[chunk].alive() for chunk in chunks)

    def _find(self, storage: torch.UntypedStorage) -> _Export | None:
        return next((e for e in self._exports.values() if e.holds(storage)), None)

    def _ref(self, tensor: torch.Tensor) -> TensorRef:
        shape, stride, dtype = tuple(tensor.shape), tensor.stride(), dtype_name(tensor.dtype)
        if not tensor.numel():
            return TensorRef(self._nothing(), 0, shape, stride, dtype)
        export = self._find(tensor.untyped_storage())
        if export is None:
            raise NotShippable("its memory could not be shared with another process")
        offset = tensor.data_ptr() - export.address
        return TensorRef(export.handle.id, offset, shape, stride, dtype)

    def _nothing(self) -> int:
        """The chunk in which tensors without elements are said to be."""
        if self._empty is None:
            pages, handle = self._new_pages(mmap.PAGESIZE)
            self._empty = handle.id
            self._exports[handle.id] = _Export(handle, 0, lambda: pages is not None)
        return self._empty

    def _share(self, storages: Iterable[torch.UntypedStorage]) -> None:
        private = [s for s in storages if not s.is_shared()]
        for storage in (s for s in storages if s.is_shared()):
            self._share_in_place(storage)
        if hasattr(torch.UntypedStorage, "_swap_data_ptr_"):
            self._move(private)
        else:  # torch < 2.13
            for storage in private:
                self._share_in_place(storage)

    def _share_in_place(self, storage: torch.UntypedStorage) -> None:
        """Let torch share this storage: the memory moves inside it, unless another process sees it already."""
        try:
            fd, size_bytes = storage._share_fd_cpu_()
        except RuntimeError as error:
            raise NotShippable(f"its memory could not be shared with another process: {error}") from error
        weak = StorageWeakRef(storage)
        self._add(self._handle(fd, size_bytes), storage.data_ptr(), lambda: not weak.expired())

    def _move(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Move the memory of storages into one memfd, inside each storage; the old memory is freed."""
        offsets = list(itertools.accumulate((_aligned(s.nbytes()) for s in storages), initial=0))
        if not offsets[-1]:
            return
        pages, handle = self._new_pages(offsets[-1])
        base = torch.frombuffer(pages, dtype=torch.uint8)
        for storage, offset in zip(storages, offsets, strict=False):
            if storage.nbytes():
                block = torch.frombuffer(pages, dtype=torch.uint8, count=storage.nbytes(), offset=offset)
                block.untyped_storage().copy_(storage)
                storage._swap_data_ptr_(block.untyped_storage())  # type: ignore[attr-defined]
        alive = weakref.ref(pages)
        self._add(handle, base.data_ptr(), lambda: alive() is not None)

    def _add(self, handle: ChunkHandle, address: int, alive: Callable[[], bool]) -> None:
        self._exports[handle.id] = _Export(handle, address, alive)

    def bind_counters(self, chunk: Chunk) -> None:
        words = MAX_COUNTERS * COUNTER_STRIDE
        self._words = (ctypes.c_uint32 * words).from_address(chunk.memory.data_ptr())
        self._counters = chunk

    def signal(self, counters: Sequence[int], values: Sequence[int]) -> None:
        for counter, value in zip(counters, values, strict=True):
            self._counter_words()[counter * COUNTER_STRIDE] = value
            self._futex.wake(self._address(counter))

    def wait(self, counters: Sequence[int], values: Sequence[int], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for counter, value in zip(counters, values, strict=True):
            while not _reached(seen := self._counter_words()[counter * COUNTER_STRIDE], value):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"counter {counter} is at {seen}, not at {value}, after {timeout_s:g} s")
                self._futex.wait(self._address(counter), seen, min(left_s, _WAIT_SLICE_S))

    def read_counters(self, wait: bool = False) -> list[int]:  # noqa: ARG002
        return list(self._counter_words()[::COUNTER_STRIDE])

    def is_sound(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def give_back_memory(self) -> None:
        """Nothing is kept on a CPU."""

    def stream_key(self) -> int:
        return 0

    def follow(self, stream: int) -> None:
        """There is one order only."""

    def share(self, start_percent: int, percent: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """A CPU's cores are shared out by threads."""
        return nullcontext()

    def synchronize(self) -> None:
        """Nothing is asynchronous on a CPU."""

    def _counter_words(self) -> ctypes.Array[ctypes.c_uint32]:
        if self._words is None:
            raise MpsrunError("expected bind_counters before the first signal or wait")
        return self._words

    def _address(self, counter: int) -> int:
        return ctypes.addressof(self._counter_words()) + 4 * counter * COUNTER_STRIDE


def open_memfd(path: str, size_bytes: int) -> mmap.mmap:
    """Map the shared memory of another process, named by /proc/PID/fd/N.

    Raises `MpsrunError` for any other name, and `MemoryGone` where the name does not stand for such memory any more.
    """
    if not _DESCRIPTOR.fullmatch(path):
        raise MpsrunError(f"expected the path of a descriptor, /proc/PID/fd/N, found {path!r}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MemoryGone(f"expected shared memory at {path}, found none: {error.strerror}") from error
    try:
        target, room = str(Path(f"/proc/self/fd/{fd}").readlink()), os.fstat(fd).st_size
        if not target.startswith(_SHARED) or not 0 < size_bytes <= room:
            raise MemoryGone(f"expected {size_bytes} bytes of shared memory, found {target} of {room} bytes")
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _reached(seen: int, value: int) -> bool:
    """Whether a 32-bit counter that wraps has reached a value (the rule of CU_STREAM_WAIT_VALUE_GEQ)."""
    return (seen - value) & 0xFFFFFFFF < 0x80000000
