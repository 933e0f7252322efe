"""CUDA processes: chunks shared by CUDA IPC, and counters that the GPU itself writes and waits for.

The counters use stream memory operations (CUDA driver API, "Stream Memory Operations"): a wait holds the stream, not
the CPU. This file, driver.py and shares.py are all that talks to the CUDA driver.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cuda.bindings import driver

from mpsrun.device.base import COUNTER_BYTES, COUNTER_STRIDE_BYTES, Chunk, ChunkHandle, TensorRef, dtype_name
from mpsrun.device.driver import driver_function
from mpsrun.device.shares import WHOLE, stream_on
from mpsrun.errors import MemoryGone, MpsrunError, NotShippable

_WAIT = int(driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32)
_WRITE = int(driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32)
_BUFFER_ID = int(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID)
WORKER = 0  # what a worker's own lane is called among its streams
_REACHED = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, as far as waits and writes of 32 bits use it."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("padding", ctypes.c_uint64 * 2),
    )


class _Span:
    """A range of device memory, in the form from which torch makes a tensor without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDevice:
    """Shared memory and order on one GPU, between processes that see the same device."""

    kind = "cuda"

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        torch.cuda.init()
        torch.empty(1, device="cuda")  # the driver calls below need a current context
        self.index = index
        self.where = torch.device("cuda", index)
        self._ids = itertools.count()
        self._own: set[int] = set()  # addresses of the chunks that this process allocated
        self._exports: dict[int, tuple[int, ChunkHandle]] = {}  # address and handle, by buffer id of the driver
        self._buffers: dict[int, tuple[int, int]] = {}  # address and buffer id, by exported chunk
        self._counters: Chunk | None = None
        self._operations: dict[tuple[int, tuple[int, ...]], ctypes.Array[_Operation]] = {}
        self._batch = driver_function("cuStreamBatchMemOp_v2", "pIpI")
        self._submitting = threading.Lock()
        # Another priority is another hardware queue: not the one in which a waiting stream is held.
        self._peek_stream = torch.cuda.Stream(index, priority=-1)
        self._peek_host = torch.empty(COUNTER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._peek_done: torch.cuda.Event | None = None
        self._streams: dict[tuple[int, int], torch.cuda.Stream] = {}  # by share

    def new_chunk(self, size_bytes: int) -> Chunk:
        torch.zeros(1, device=self.where)  # makes the context current in a thread that is new
        status, address = driver.cuMemAlloc(size_bytes)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            torch.cuda.empty_cache()
            status, address = driver.cuMemAlloc(size_bytes)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"mpsrun: no {size_bytes >> 20} MiB of GPU memory for the shared arena")
        _check(status, "cuMemAlloc")
        memory = self._tensor(int(address), size_bytes)
        memory.zero_()
        torch.cuda.current_stream().synchronize()
        self._own.add(int(address))
        return Chunk(self._handle(int(address), size_bytes), memory, int(address))

    def open_chunk(self, handle: ChunkHandle) -> Chunk:
        raw = driver.CUipcMemHandle()
        raw.reserved = handle.token
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        try:
            address = _call("cuIpcOpenMemHandle", driver.cuIpcOpenMemHandle(raw, int(flags)))
        except MpsrunError as error:  # the driver has no word of its own for it
            raise MemoryGone(f"expected memory of another process: {error}") from error
        return Chunk(handle, self._tensor(int(address), handle.size_bytes), int(address))

    def close_chunk(self, chunk: Chunk) -> None:
        if chunk is self._counters:
            self._counters = None
            self._operations.clear()
        chunk.memory = torch.empty(0, dtype=torch.uint8)
        if chunk.owner in self._own:
            self._own.discard(chunk.owner)
            _call("cuMemFree", driver.cuMemFree(chunk.owner))
        else:
            _call("cuIpcCloseMemHandle", driver.cuIpcCloseMemHandle(chunk.owner))

    def _tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_Span(address, size_bytes), device=self.where)

    def _handle(self, address: int, size_bytes: int) -> ChunkHandle:
        raw = _call("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(address))
        return ChunkHandle(next(self._ids), size_bytes, bytes(raw.reserved))

    def export(self, tensors: Sequence[torch.Tensor]) -> list[TensorRef]:
        """Whole allocations of torch's caching allocator are shared, where they are: nothing moves."""
        return [self._export(t) for t in tensors]

    def exported(self) -> dict[int, ChunkHandle]:
        self._exports = {i: entry for i, entry in self._exports.items() if _buffer_id(entry[0]) == i}
        self._buffers = {handle.id: (address, i) for i, (address, handle) in self._exports.items()}
        return {handle.id: handle for _, handle in self._exports.values()}

    def holds(self, chunks: Sequence[int]) -> bool:
        for chunk in chunks:
            address, buffer_id = self._buffers.get(chunk, (0, 0))
            if not address or _buffer_id(address) != buffer_id:
                return False
        return True

    def _export(self, tensor: torch.Tensor) -> TensorRef:
        address = tensor.data_ptr()
        if tensor.device != self.where or not address:
            raise NotShippable(f"a tensor on {tensor.device} cannot be shared with workers on cuda:{self.index}")
        status, base, size_bytes = driver.cuMemGetAddressRange(address)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise NotShippable("GPU memory that the CUDA driver does not know")
        buffer_id = _buffer_id(address)
        if buffer_id is None:
            raise NotShippable("GPU memory that the CUDA driver does not know")
        if buffer_id not in self._exports:
            try:
                self._exports[buffer_id] = int(base), self._handle(int(base), int(size_bytes))
            except MpsrunError as error:
                raise NotShippable(
                    "GPU memory that CUDA IPC cannot share (expandable_segments in PYTORCH_CUDA_ALLOC_CONF, or "
                    "another allocator): leave it at its default"
                ) from error
        chunk = self._exports[buffer_id][1].id
        shape, stride = tuple(tensor.shape), tensor.stride()
        return TensorRef(chunk, address - int(base), shape, stride, dtype_name(tensor.dtype))

    def bind_counters(self, chunk: Chunk) -> None:
        self._counters = chunk
        self._operations.clear()

    def signal(self, counters: Sequence[int], values: Sequence[int]) -> None:
        self._submit(_WRITE, counters, values)

    def wait(self, counters: Sequence[int], values: Sequence[int], timeout_s: float) -> None:  # noqa: ARG002
        self._submit(_WAIT, counters, values)

    def _submit(self, kind: int, counters: Sequence[int], values: Sequence[int]) -> None:
        """One driver call for all counters; the parameter structs are made once for each set of counters."""
        if not counters:
            return
        key = (kind, tuple(counters))
        with self._submitting:  # two threads may use the same structs
            operations = self._operations.get(key)
            if operations is None:
                operations = self._operations[key] = self._new_operations(kind, counters)
            for operation, value in zip(operations, values, strict=True):
                operation.value = value
            status = self._batch(self.stream_key(), len(operations), operations, 0)
        if status:
            raise MpsrunError(f"cuStreamBatchMemOp failed: {driver.CUresult(status).name}")

    def _new_operations(self, kind: int, counters: Sequence[int]) -> ctypes.Array[_Operation]:
        if self._counters is None:
            raise MpsrunError("expected bind_counters before the first signal or wait")
        base, flags = self._counters.memory.data_ptr(), _REACHED if kind == _WAIT else 0
        made = (_Operation(kind, base + counter * COUNTER_STRIDE_BYTES, 0, flags) for counter in counters)
        return (_Operation * len(counters))(*made)

    def read_counters(self, wait: bool = False) -> list[int] | None:
        """The last finished peek, if any, while the next one is on its way; with `wait` a fresh one."""
        if self._counters is None:
            return None
        seen = None
        if self._peek_done is not None and not wait:
            if not self._peek_done.query():
                return None
            seen = self._peeked()
        done = self._peek(self._counters)
        if wait:
            done.synchronize()
            seen = self._peeked()
        return seen

    def _peek(self, counters: Chunk) -> torch.cuda.Event:
        """Have the counters copied, without memory that would have to be allocated."""
        with torch.cuda.stream(self._peek_stream):
            self._peek_host.copy_(counters.memory[: self._peek_host.numel()], non_blocking=True)
            self._peek_done = torch.cuda.Event()
            self._peek_done.record()
        return self._peek_done

    def _peeked(self) -> list[int]:
        words = self._peek_host.view(torch.int32)[:: COUNTER_STRIDE_BYTES // 4]
        return [value & 0xFFFFFFFF for value in words.tolist()]

    def is_sound(self, timeout_s: float) -> bool:
        """A look at the counters: in a context that a fault has poisoned it fails, or never ends."""
        if self._counters is None:
            return True
        try:
            done = self._peek(self._counters)
            deadline = time.monotonic() + timeout_s
            while not done.query():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
        except RuntimeError:  # CUDA errors, which stay with the context
            return False
        return True

    def give_back_memory(self) -> None:
        torch.cuda.empty_cache()

    def stream_key(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.index)

    def follow(self, stream: int) -> None:
        """Let the current stream go on only after what `stream` (a `stream_key`) has been given so far."""
        event = torch.cuda.ExternalStream(stream, self.index).record_event()
        torch.cuda.current_stream(self.index).wait_event(event)

    @contextmanager
    def share(self, start_percent: int, percent: int) -> Iterator[None]:
        """Signals and waits stay on the caller's stream, which goes on once the share's is done."""
        place = start_percent, percent
        if place == WHOLE:
            yield
            return
        if place not in self._streams:
            self._streams[place] = stream_on(self.where, WORKER, place)
        outside, inside = torch.cuda.current_stream(self.index), self._streams[place]
        inside.wait_stream(outside)
        try:
            with torch.cuda.stream(inside):
                yield
        finally:
            outside.wait_stream(inside)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)


def _buffer_id(address: int) -> int | None:
    """What tells one allocation from a later one at the same address; None where nothing is allocated there."""
    found = ctypes.c_uint64()
    status = driver_function("cuPointerGetAttribute", "pIp")(ctypes.addressof(found), _BUFFER_ID, address)
    return None if status else found.value


def _call(name: str, answer: tuple[Any, ...]) -> Any:
    _check(answer[0], name)
    return answer[1] if len(answer) > 1 else None


def _check(status: Any, name: str) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise MpsrunError(f"{name} failed: {driver.CUresult(status).name}")
