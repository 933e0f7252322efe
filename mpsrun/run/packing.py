"""The memory of a recording in one piece for each stream.

Torch's allocator cuts tensors from segments that it cannot join or shrink, and takes another segment where no piece is
large enough; what is left in them is never used, in any replay. So while a recording is made, the allocations of each
stream are noted; a segment that all of them fit into is looked for; and the next recording of the same begins with
these segments.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mpsrun.run.streams import recorded_streams

Function = Callable[[], Any]
# As torch's allocator has it, in bytes.
UNIT = 512  # sizes are multiples of it
SMALL = 1 << 20  # tensors up to this have segments of their own; what is left of a piece is cut off if it is larger
PAGE = 2 << 20  # sizes of segments are multiples of it; those of small tensors are as large
LEAST = 10 << 20  # a smaller segment is not made as it is asked for
TRIES = 8  # sizes between the least that could do and one that does


class Event(NamedTuple):
    """What happens to a piece of memory, by its address: it is taken with so many bytes, or given back with none."""

    address: int
    size: int


class Packing:
    """How much memory each stream needs for a recorded forward and its backward together."""

    def __init__(self) -> None:
        self._events: defaultdict[int, list[Event]] = defaultdict(list)  # by stream
        self._segments: defaultdict[int, int] = defaultdict(int)  # by stream, the bytes of those that torch took
        self._forward_was_noted = self._is_complete = False

    @property
    def is_known(self) -> bool:
        """Whether the next recording can be laid out, and gains by that."""
        return self._is_complete and bool(self._sizes)

    @functools.cached_property
    def _sizes(self) -> Mapping[int, int]:
        """By stream, where that is less than torch took, the bytes of its segment; for who has seen all of it."""
        sizes = {stream: segment_size(events) for stream, events in self._events.items()}
        self._events.clear()
        return {stream: size for stream, size in sizes.items() if 0 < size < self._segments[stream]}

    def watched(self, forward: Function) -> Function:
        """A forward that is about to be recorded, whose allocations are noted."""

        def run() -> Any:
            self._events.clear()
            self._segments.clear()
            result, self._forward_was_noted = self._noting(forward)
            return result

        return run

    def watched_backward(self, backward: Function) -> Function:
        """The backward of what was watched."""

        def run() -> Any:
            result, was_noted = self._noting(backward)
            self._is_complete = self._forward_was_noted and was_noted
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
            if size is None:
                continue
            if stream != main:  # what does not take part in the recording has other memory
                stream.wait_stream(main)
            segment = torch.cuda.caching_allocator_alloc(size, main.device, stream)
            torch.cuda.caching_allocator_delete(segment)
            if stream != main:
                main.wait_stream(stream)

    def _noting(self, function: Function) -> tuple[Any, bool]:
        """What `function` returns, and whether its allocations were noted."""
        # A history that the script records stays as it is.
        if not _is_recorded() or torch._C._cuda_isHistoryEnabled():
            return function(), False
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
        try:
            result = function()
            snapshot = torch.cuda.memory._snapshot()
        finally:
            torch.cuda.memory._record_memory_history(None)
        if not _cuts_any_size(snapshot.get("allocator_settings", {})):
            return result, False
        self._note(snapshot["device_traces"][torch.cuda.current_device()])
        return result, True

    def _note(self, trace: Sequence[dict[str, Any]]) -> None:
        streams = {stream.cuda_stream for stream in recorded_streams(torch.cuda.current_stream().device)}
        waiting: dict[int, int] = {}  # by address, the stream: given back, but perhaps still read by another stream
        for entry in trace:
            action, stream = entry["action"], entry.get("stream")
            if stream not in streams:
                continue
            if action == "alloc":
                self._events[stream].append(Event(entry["addr"], entry["size"]))
            elif action == "free_requested":
                waiting[entry["addr"]] = stream
            elif action == "free_completed":
                waiting.pop(entry["addr"], None)
                self._events[stream].append(Event(entry["addr"], 0))
            elif action == "segment_alloc" and entry["size"] > PAGE:
                self._segments[stream] += entry["size"]
        for address, stream in waiting.items():  # to be had when the recording ends
            self._events[stream].append(Event(address, 0))


def segment_size(events: Sequence[Event]) -> int:
    """Bytes of a segment that all large tensors of one stream fit into, the smallest tried; 0 where there are none."""
    open_ended = _Segment(math.inf)
    open_ended.hold(events)
    least, most = _pages(open_ended.peak), _pages(open_ended.top)
    step = _pages((most - least) / TRIES) or PAGE
    for size in [*range(least, most, step), *range(most, 2 * most, step)]:
        if _Segment(size).hold(events):
            return max(size, LEAST) if size else 0
    return 2 * most


def _pages(size: float) -> int:
    return math.ceil(size / PAGE) * PAGE


class _Segment:
    """A segment in the hands of torch's allocator, which takes the smallest free piece that is large enough.

    size: bytes. peak: how many of them were taken at once. top: where the last one ended.
    """

    def __init__(self, size: float) -> None:
        self.top = 0
        self.peak = 0.0
        self._used = 0.0
        self._free: dict[int, float] = {0: size} if size else {}  # by where it starts, the size of a piece
        self._taken: dict[int, tuple[int, float]] = {}  # by a tensor's address, its piece

    def hold(self, events: Sequence[Event]) -> bool:
        """Whether there was a piece for every large tensor while all this happened; it ends where there is none."""
        for address, size in events:
            if address in self._taken:  # also where nobody saw it given back
                self._give_back(*self._taken.pop(address))
            rounded = math.ceil(size / UNIT) * UNIT
            if rounded > SMALL and not self._take(address, rounded):
                return False
        return True

    def _take(self, address: int, size: int) -> bool:
        pieces = [(free, start) for start, free in self._free.items() if free >= size]
        if not pieces:
            return False
        free, start = min(pieces)
        del self._free[start]
        if free - size > SMALL:
            self._free[start + size] = free - size
            free = size
        self._taken[address] = start, free
        self._used += free
        self.peak = max(self.peak, self._used)
        self.top = max(self.top, start + size)
        return True

    def _give_back(self, start: int, size: float) -> None:
        self._used -= size
        after = self._free.pop(start + int(size), 0)
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


def _cuts_any_size(settings: Mapping[str, Any]) -> bool:
    """Whether tensors of any size are cut from one segment, and nothing else joins what is left."""
    grows, rounded = settings.get("expandable_segments", True), settings.get("roundup_power2_divisions", {"": 1})
    return settings.get("max_split_size", 0) < 0 and not grows and not any(rounded.values())
