"""Side streams: lanes inside the lead, for branches that a GPU can run at the same time without another process.

Autograd runs the backward of an op on the stream of its forward, so that a region needs no more than this: side streams
that start where the region forks, and a main stream that waits for them where it joins. What crosses between streams is
told to torch's allocator, which gives memory back to the stream that it was made on.

A lane with a share of the GPU has a stream of a green context. The main stream always has the whole GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from mpsrun.device.shares import WHOLE, stream_on

# What crosses between the main stream and the others: (lane, values) for each side stream.
LaneValues = Sequence[tuple[int, Sequence[Any]]]
# By lane, where its share of the multiprocessors starts and how large it is, in percent; all others have the whole GPU.
Places = Mapping[int, tuple[int, int]]
MAIN = 0
# By device, lane and place: the stream of what runs op by op, and that of what is recorded.
_streams: dict[tuple[torch.device, int, tuple[int, int]], tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
# By a stream that is recorded, the one beside it; all live as long as the process.
_beside: dict[torch.cuda.Stream, torch.cuda.Stream] = {}


class Sides(Protocol):
    """The streams of one execution of a region."""

    def use(self, lane: int) -> None:
        """Submit what follows to this lane: 0 is the main stream, -i side stream i."""

    def join(self, outputs: LaneValues) -> None:
        """Go on with the main stream, once the side streams have made these outputs (by lane)."""


class CudaSides:
    """Side streams of one GPU; all regions use the same ones, but what is recorded has others.

    While one thread records, another may run the same network op by op.
    """

    def __init__(self, device: torch.device, inputs: LaneValues, places: Places, apart: bool) -> None:
        """Start the lanes of `inputs`, which are what each of them reads.

        apart: whether lanes share parameters. Autocast keeps the cast of one that was made on a stream for whoever
        comes next, who would read it on another one, perhaps too early.
        """
        self._apart = apart
        self._main = torch.cuda.current_stream(device)
        records = torch.cuda.is_current_stream_capturing()
        # Until main waits for the sides: torch forgets who uses what is freed while another thread records.
        self._inputs = () if records else inputs
        self._sides = {lane: _stream(device, records, lane, places.get(lane, WHOLE)) for lane, _ in inputs}
        fork = self._main.record_event()
        for lane, values in inputs:
            self._sides[lane].wait_event(fork)
            _lend(values, self._sides[lane])

    def use(self, lane: int) -> None:
        if self._apart:
            torch.clear_autocast_cache()
        torch.cuda.set_stream(self._sides.get(lane, self._main))

    def join(self, outputs: LaneValues) -> None:
        self.use(MAIN)
        for stream in self._sides.values():
            self._main.wait_stream(stream)
        self._inputs = ()
        for _, values in outputs:
            _lend(values, self._main)


class OneOrder:
    """A CPU has no streams: everything runs in the order of the program."""

    def use(self, lane: int) -> None:
        """There is one lane only."""

    def join(self, outputs: LaneValues) -> None:
        """Nothing is under way."""


def open_sides(device: torch.device, inputs: LaneValues, places: Places, apart: bool = False) -> Sides:
    """Fork into the lanes of `inputs`; apart: whether they share parameters."""
    return CudaSides(device, inputs, places, apart) if device.type == "cuda" else OneOrder()


def side_streams(device: torch.device) -> list[tuple[torch.cuda.Stream, torch.cuda.Stream]]:
    """Those of a device so far: by lane the one that runs op by op, and the one that is recorded in its place."""
    known = list(_streams.items())  # another thread may add to them
    return [pair for (where, *_), pair in known if where == device]


def _stream(device: torch.device, records: bool, lane: int, place: tuple[int, int]) -> torch.cuda.Stream:
    key = device, lane, place
    if key not in _streams:
        # A script that holds its last loss also holds what accumulated gradients on the streams of the plan before.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # All at once, so that none is made while something is recorded.
        _streams.setdefault(key, (stream_on(*key), recorded_stream(*key)))
    return _streams[key][records]


def recorded_stream(device: torch.device, lane: int = MAIN, place: tuple[int, int] = WHOLE) -> torch.cuda.Stream:
    """Another stream to record, with one beside it for what nothing on it waits for."""
    stream = stream_on(device, lane, place)
    _beside[stream] = stream_on(device, lane, place)
    return stream


def stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream | None:
    """The one beside a stream that is recorded; None where that is one of the script's."""
    return _beside.get(stream)


def recorded_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """All of ours on a device that are recorded, with those beside them."""
    known = list(_beside.items())  # another thread may add to them
    return [stream for pair in known for stream in pair if stream.device == device]


def _lend(values: Sequence[Any], stream: torch.cuda.Stream) -> None:
    """Have the allocator keep these until `stream` is done with them, whoever frees them first."""
    for value in values:
        if isinstance(value, torch.Tensor):
            value.record_stream(stream)
        elif isinstance(value, list | tuple):
            _lend(value, stream)
