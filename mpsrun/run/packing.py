"""The memory of a recording in one piece for each stream.

Torch's allocator cuts tensors from segments that it cannot join or shrink, and takes another segment where no piece is
large enough; what is left in them is never used, in any replay. So while a recording is made, the allocations of each
stream are noted; a segment that all of them fit into is looked for; and the next recording of the same begins with
these segments.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mpsrun.run.streams import recorded_streams

Function = Callable[[], Any]
# As torch's allocator has it, in bytes.
UNIT = 512  # sizes are multiples of it
SMALL = 1 << 20  # tensors up to this have segments of their own; what is left of a piece is cut off if it is larger
PAGE = 2 << 20  # sizes of segments are multiples of it
LEAST = 10 << 20  # a smaller segment is not made as it is asked for
MOST_TRIES = 8


class Event(NamedTuple):
    """What happens to a piece of memory, by its address: it is taken with so many bytes, or given back with none."""

    address: int
    size: int


class Packing:
    """How much memory each stream needs for a recorded forward and its backward together."""

    def __init__(self) -> None:
        self._events: defaultdict[int, list[Event]] = defaultdict(list)  # by stream
        self._sizes: dict[int, int] = {}

    @property
    def is_known(self) -> bool:
        """Whether the next recording can be laid out."""
        return bool(self._sizes)

    def watched(self, forward: Function) -> Function:
        """A forward that is about to be recorded, whose allocations are noted."""

        def run() -> Any:
            self._events.clear()
            with self._noting():
                return forward()

        return run

    def watched_backward(self, backward: Function) -> Function:
        """The backward of what was watched; with it the sizes are known."""

        def run() -> Any:
            with self._noting():
                result = backward()
            self._sizes = {stream: segment_size(events) for stream, events in self._events.items()}
            self._events.clear()
            return result

        return run

    def laid_out(self, forward: Function) -> Function:
        """A forward that is about to be recorded, beginning with a segment for each stream."""

        def run() -> Any:
            if _is_recorded():
                self._lay_out()
            return forward()

        return run

    def _lay_out(self) -> None:
        main = torch.cuda.current_stream()
        for stream in recorded_streams(main.device):
            size = self._sizes.get(stream.cuda_stream)
            if not size:
                continue
            if stream != main:  # what does not take part in the recording has other memory
                stream.wait_stream(main)
            segment = torch.cuda.caching_allocator_alloc(size, main.device, stream)
            torch.cuda.caching_allocator_delete(segment)
            if stream != main:
                main.wait_stream(stream)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        # A history that the script records stays as it is.
        if not _is_recorded() or torch._C._cuda_isHistoryEnabled():
            yield
            return
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
        try:
            yield
            snapshot = torch.cuda.memory._snapshot()
        finally:
            torch.cuda.memory._record_memory_history(None)
        if _cuts_any_size(snapshot["allocator_settings"]):
            self._note(snapshot["device_traces"][torch.cuda.current_device()])

    def _note(self, trace: Sequence[dict[str, Any]]) -> None:
        streams = {stream.cuda_stream for stream in recorded_streams(torch.cuda.current_stream().device)}
        waiting: dict[int, int] = {}  # by address, the stream: given back, but perhaps still read by another stream
        for entry in trace:
            action, stream = entry["action"], entry["stream"]
            if stream not in streams:
                continue
            if action == "alloc":
                self._events[stream].append(Event(entry["addr"], entry["size"]))
            elif action == "free_requested":
                waiting[entry["addr"]] = stream
            elif action == "free_completed":
                waiting.pop(entry["addr"], None)
                self._events[stream].append(Event(entry["addr"], 0))
        for address, stream in waiting.items():  # to be had when the recording ends
            self._events[stream].append(Event(address, 0))


def segment_size(events: Sequence[Event]) -> int:
    """Bytes of the smallest segment found that all large tensors of one stream fit into; 0 where there are none."""
    size = _Segment(None).after(events).top
    for _ in range(MOST_TRIES):
        size = math.ceil(size / PAGE) * PAGE
        missing = _Segment(size).after(events).missing
        if not missing:
            break
        size += missing
    return max(size, LEAST) if size else 0


class _Segment:
    """A segment in the hands of torch's allocator, which takes the smallest free piece that is large enough.

    size: bytes, as many as needed if None. top: where the last byte ended that was ever used. missing: the size of the
    largest tensor for which there was no piece.
    """

    def __init__(self, size: int | None) -> None:
        self.top = self.missing = 0
        self._free: dict[int, float] = {
            0: math.inf if size is None else size
        }  # by where it starts, the size of a piece
        self._taken: dict[int, tuple[int, float]] = {}  # by a tensor's address, its piece

    def after(self, events: Sequence[Event]) -> _Segment:
        """The same, when all that has happened."""
        for address, size in events:
            if size:
                self._take(address, math.ceil(size / UNIT) * UNIT)
            elif address in self._taken:
                self._give_back(*self._taken.pop(address))
        return self

    def _take(self, address: int, size: int) -> None:
        if size <= SMALL:
            return
        pieces = [(free, start) for start, free in self._free.items() if free >= size]
        if not pieces:
            self.missing = max(self.missing, size)
            return
        free, start = min(pieces)
        del self._free[start]
        if free - size > SMALL:
            self._free[start + size] = free - size
            free = size
        self._taken[address] = start, free
        self.top = max(self.top, start + size)

    def _give_back(self, start: int, size: float) -> None:
        after = self._free.pop(int(start + size), 0) if size < math.inf else 0
        before = next((s for s, free in self._free.items() if s + free == start), None)
        if before is None:
            self._free[start] = size + after
        else:
            self._free[before] += size + after


def _is_recorded() -> bool:
    """Whether the current stream is, on a GPU whose allocator tells what it does."""
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return False
    return torch.cuda.get_allocator_backend() == "native"


def _cuts_any_size(settings: dict[str, Any]) -> bool:
    """Whether tensors of any size are cut from one segment, and nothing else joins what is left."""
    rounded = any(settings["roundup_power2_divisions"].values())
    return settings["max_split_size"] < 0 and not settings["expandable_segments"] and not rounded
