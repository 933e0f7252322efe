"""A one-way queue of small messages in shared memory: what a step needs, without a socket's way through its threads.

    [ head | tail | asleep: uint32 each, a cache line apart | records: a length (uint32) and its bytes, padded to 4 ]

The writer owns `head`, the reader `tail` and `asleep`; head and tail only grow and count bytes modulo 2**32. A record
of length 0 says that the next message is on the socket, so that both ways together keep one order. Records wrap around
the end bytewise. A reader with a core to itself spins for a moment before it sleeps: waking it costs the writer more
than the whole write.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
import weakref

from mpsrun.device.cpu import open_memfd
from mpsrun.device.futex import Futex
from mpsrun.errors import MpsrunError

CAPACITY_BYTES = 1 << 20
_HEAD, _TAIL, _ASLEEP, _DATA = 0, 64, 128, 192
_SLICE_S = 0.02  # also the longest delay should a wake ever be missed
_MASK = 0xFFFFFFFF


class Ring:
    """Either end of a ring; one process writes, one reads."""

    def __init__(self, pages: mmap.mmap, path: str) -> None:
        self.path = path
        self._pages = pages
        self._data = memoryview(pages)[_DATA:]
        self._head = ctypes.c_uint32.from_buffer(pages, _HEAD)
        self._tail = ctypes.c_uint32.from_buffer(pages, _TAIL)
        self._asleep = ctypes.c_uint32.from_buffer(pages, _ASLEEP)
        self._written = self._head.value  # the writer's own copies: what it wrote, and how far it saw the reader
        self._seen_tail = self._tail.value
        self._fence = threading.Lock()
        self._futex = Futex()

    @classmethod
    def create(cls) -> Ring:
        """A ring in a memfd, which another process of this user opens by `path`."""
        fd = os.memfd_create("mpsrun-ring", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, _DATA + CAPACITY_BYTES)
        ring = cls(mmap.mmap(fd, _DATA + CAPACITY_BYTES), f"/proc/{os.getpid()}/fd/{fd}")
        weakref.finalize(ring, os.close, fd).atexit = False
        return ring

    @classmethod
    def open(cls, path: str) -> Ring:
        return cls(open_memfd(path, _DATA + CAPACITY_BYTES), path)

    @property
    def unread_bytes(self) -> int:
        """How much was written and not yet read."""
        return self._head.value - self._tail.value & _MASK

    def close(self) -> None:
        """Unmap this end; nothing can be written or read here any more."""
        self._data.release()
        del self._head, self._tail, self._asleep  # they hold the pages
        self._pages.close()

    def write(self, message: bytes, timeout_s: float) -> None:
        """Append a message; empty stands for one on the socket. Waits for room only where the reader is far behind."""
        length = len(message)
        size = 4 + (length + 3 & ~3)
        if size > CAPACITY_BYTES // 4:
            raise MpsrunError(f"expected a message of at most {CAPACITY_BYTES // 4} bytes, found {length}")
        head = self._written
        if head + size - self._seen_tail & _MASK > CAPACITY_BYTES:
            self._wait_for_room(size, timeout_s)
        self._put(head, length.to_bytes(4, "little") + message)
        self._written = self._head.value = head + size & _MASK
        with self._fence:  # an atomic operation: the reader sees the new head, or we see that it sleeps
            asleep = self._asleep.value
        if asleep:
            self._futex.wake(ctypes.addressof(self._head))

    def _wait_for_room(self, size: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._written + size - (seen := self._tail.value) & _MASK > CAPACITY_BYTES:
            if time.monotonic() > deadline:
                raise MpsrunError(f"a worker has not read its messages for {timeout_s:g} s")
            self._futex.wait(ctypes.addressof(self._tail), seen, 0.001)
        self._seen_tail = seen

    def read(self, timeout_s: float, spin_s: float = 0.0) -> bytes | None:
        """The next message, or None after `timeout_s`; the first `spin_s` of the wait are spent awake."""
        if self._head.value == self._tail.value and not self._wait(timeout_s, spin_s):
            return None
        length = int.from_bytes(self._get(self._tail.value, 4), "little")
        if length > CAPACITY_BYTES // 4:
            raise MpsrunError(f"expected a record of at most {CAPACITY_BYTES // 4} bytes, found {length}")
        message = self._get(self._tail.value + 4, length)
        self._tail.value = self._tail.value + 4 + -(-length // 4) * 4 & _MASK
        return message

    def _wait(self, timeout_s: float, spin_s: float) -> bool:
        """Wait for a record; False where none came in time."""
        start = time.monotonic()
        while self._head.value == self._tail.value:
            waited_s = time.monotonic() - start
            if waited_s >= timeout_s:
                return False
            if waited_s < spin_s:
                continue
            self._asleep.value = 1
            with self._fence:
                seen = self._head.value
            if seen == self._tail.value:
                self._futex.wait(ctypes.addressof(self._head), seen, min(timeout_s - waited_s, _SLICE_S))
            self._asleep.value = 0
        return True

    def _put(self, position: int, record: bytes) -> None:
        start, end = position % CAPACITY_BYTES, position % CAPACITY_BYTES + len(record)
        if end <= CAPACITY_BYTES:
            self._data[start:end] = record
            return
        first = CAPACITY_BYTES - start
        self._data[start:CAPACITY_BYTES] = record[:first]
        self._data[: len(record) - first] = record[first:]

    def _get(self, position: int, size: int) -> bytes:
        start = position % CAPACITY_BYTES
        first = min(size, CAPACITY_BYTES - start)
        return bytes(self._data[start : start + first]) + bytes(self._data[: size - first])
