"""The latest sample in a page of shared memory: one writer, readers that never wait for it.

    [ sequence: uint64, odd while the writer writes | length: uint32 | the sample as msgpack ]

The file lies in the run directory and goes with it.
"""

import mmap
import os
import struct
from pathlib import Path

import msgspec

from mpsrun.monitor.sample import Sample

PAGE_BYTES = 4096
_HEAD = struct.Struct("<QI")
_SEQUENCE = struct.Struct("<Q")
_MOST_TENANTS = 32
_TRIES = 3

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Sample)


class Writer:
    """The monitor's end."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, PAGE_BYTES)
            self._page = mmap.mmap(descriptor, PAGE_BYTES)
        finally:
            os.close(descriptor)
        self._sequence = 0

    def write(self, sample: Sample) -> None:
        """Replace the sample; of many tenants those with the most memory are named."""
        if sample.tenants is not None and len(sample.tenants) > _MOST_TENANTS:
            largest = sorted(sample.tenants, key=lambda tenant: -(tenant.memory_mib or 0))[:_MOST_TENANTS]
            sample = msgspec.structs.replace(sample, tenants=tuple(largest))
        data = _encoder.encode(sample)
        if len(data) > PAGE_BYTES - _HEAD.size:
            sample = msgspec.structs.replace(sample, problem=sample.problem[:200])
            data = _encoder.encode(sample)
        self._put(self._sequence + 1)
        self._page[_HEAD.size : _HEAD.size + len(data)] = data
        struct.pack_into("<I", self._page, _SEQUENCE.size, len(data))
        self._put(self._sequence + 1)

    def _put(self, sequence: int) -> None:
        self._sequence = sequence
        _SEQUENCE.pack_into(self._page, 0, sequence)

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()


class Reader:
    """The lead's end. There may be no page yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._page: mmap.mmap | None = None
        self._seen = 0

    def fresh(self) -> Sample | None:
        """Return a sample that was not returned before; None where there is none, or it is just being written."""
        page = self._page or self._open()
        if page is None or _SEQUENCE.unpack_from(page)[0] == self._seen:
            return None
        for _ in range(_TRIES):
            sequence, length = _HEAD.unpack_from(page)
            data = page[_HEAD.size : _HEAD.size + min(length, PAGE_BYTES - _HEAD.size)]
            if sequence % 2 == 0 and _SEQUENCE.unpack_from(page)[0] == sequence:
                self._seen = sequence
                try:
                    return _decoder.decode(data)
                except msgspec.DecodeError:  # written by something else
                    return None
        return None

    def _open(self) -> mmap.mmap | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size >= PAGE_BYTES:
                self._page = mmap.mmap(descriptor, PAGE_BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        return self._page
