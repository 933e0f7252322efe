"""Recordings with their memory in one piece a stream: how large that is, and when it is asked for."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captures import Pair, kept_graph, noted, on_captured, step, three
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpsrun.run import packing, replay
from mpsrun.run.captured import Captured
from mpsrun.run.packing import LEAST, PAGE, SMALL, Event, Packing, segment_size
from mpsrun.run.recorder import Recording, Repeater

MIB = 1 << 20


def taken(*sizes: float) -> list[Event]:
    """MiB by address 1, 2, ..."""
    return [Event(i, int(size * MIB)) for i, size in enumerate(sizes, 1)]


def given_back(*addresses: int) -> list[Event]:
    return [Event(address, 0) for address in addresses]


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], 0),
        (taken(0.5, 1), 0),  # small ones have other segments
        (taken(3), 10),
        (taken(12, 7), 20),
        ([*taken(12, 7), *given_back(1), Event(3, 12 * MIB)], 20),
        ([*taken(12, 8, 4), *given_back(1, 2), Event(4, 20 * MIB)], 24),  # neighbours are joined
        ([*taken(12, 8, 4), *given_back(2, 1), Event(4, 20 * MIB)], 24),
        ([*taken(12, 8, 4), *given_back(1, 3), Event(4, 14 * MIB)], 34),  # these are none
        ([*taken(4, 2, 12, 2), *given_back(1, 3), Event(5, 4 * MIB), Event(6, 12 * MIB)], 20),  # the smallest piece
        ([*taken(12, 9), *given_back(1), Event(3, int(11.5 * MIB)), Event(4, MIB // 4)], 22),  # what is left is wasted
        ([*taken(20), *given_back(1, 1, 9)], 20),
        ([*taken(30), Event(1, 30 * MIB)], 30),  # given back while nobody looked
    ],
)
def test_size_of_a_segment(events: Sequence[Event], wanted: int) -> None:
    assert segment_size(events) == wanted * MIB


def test_the_end_of_a_segment_is_a_piece_as_others_are() -> None:
    """The 8 MiB at its end are taken before the 9 in front, into which the next one does not fit any more then."""
    events = [
        *taken(9, 2, 20),
        *given_back(3),
        Event(4, 12 * MIB),
        *given_back(1),
        Event(5, 8 * MIB),
        Event(6, 9 * MIB),
    ]
    assert segment_size(events) == 32 * MIB
    assert not packing._Segment(28 * MIB).hold(events)


@given(st.integers(0, 10**6))
def test_what_fits_is_never_in_two_places(seed: int) -> None:
    drawn = random.Random(seed)
    live: dict[int, int] = {}
    events: list[Event] = []
    peak = 0
    for address in range(60):
        while live and drawn.random() < 0.45:
            gone = drawn.choice([*live])
            del live[gone]
            events.append(Event(gone, 0))
        live[address] = drawn.choice([SMALL // 2, SMALL + 512, 3 * MIB, 10 * MIB + 1000, drawn.randrange(1, 40 * MIB)])
        events.append(Event(address, live[address]))
        peak = max(peak, sum(size for size in live.values() if size > SMALL))
    size = segment_size(events)
    assert size % PAGE == 0
    assert size >= peak
    assert size == 0 or size >= LEAST
    segment = packing._Segment(size)
    for event in events:
        assert segment.hold([event])
        pieces = sorted([*segment._taken.values(), *segment._free.items()])
        assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(pieces))
        assert sum(length for _, length in pieces) == size, "nothing is lost"
    for address in live:
        segment.hold([Event(address, 0)])
    assert segment._free == ({0: size} if size else {})


class Stream:
    """One of ours that is recorded."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.device = torch.device("cuda", 0)
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


class Gpu:
    """The allocator of a GPU whose current stream is recorded; it tells what `trace` says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.streams = [Stream(7), Stream(8), Stream(9)]
        self.trace: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {
            "max_split_size": -1,
            "expandable_segments": False,
            "roundup_power2_divisions": {"1": 0},
        }
        self.history: list[str | None] = []
        self.segments: list[tuple[int, Stream]] = []
        patch.setattr(packing, "_is_recorded", lambda: True)
        patch.setattr(packing, "recorded_streams", lambda _device: self.streams)
        patch.setattr(torch.cuda, "current_stream", lambda: self.streams[0])
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "caching_allocator_alloc", lambda size, _d, s: self.segments.append((size, s)))
        patch.setattr(torch.cuda, "caching_allocator_delete", lambda _pointer: None)
        patch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: False, raising=False)
        patch.setattr(torch.cuda.memory, "_record_memory_history", lambda on, **_: self.history.append(on))
        patch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)

    def snapshot(self) -> dict[str, Any]:
        return {"allocator_settings": self.settings, "device_traces": [self.trace]}

    def does(self, *actions: tuple[str, int, float, int]) -> Callable[[], str]:
        """(action, address, MiB, stream)."""

        def run() -> str:
            self.trace = [
                {"action": action, "addr": address, "size": int(size * MIB), "stream": stream}
                for action, address, size, stream in actions
            ]
            return "done"

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


LOOSE = [("segment_alloc", 0, 40, stream) for stream in (7, 8, 9)]  # what torch took for each stream


def both(found: Packing, forward: Callable[[], str], backward: Callable[[], str]) -> Packing:
    found.watched(forward)()
    found.watched_backward(backward)()
    return found


def test_sizes_are_those_of_a_forward_with_its_backward(gpu: Gpu) -> None:
    found = Packing()
    forward = gpu.does(
        *LOOSE,
        ("alloc", 1, 30, 7),
        ("alloc", 2, 16, 8),
        ("alloc", 3, 50, 6),  # a stream of the script
        ("free_requested", 2, 16, 8),  # still read by another stream, until the recording ends
        ("alloc", 4, 12, 8),
        ("alloc", 5, 0.25, 9),
    )
    backward = gpu.does(
        ("alloc", 6, 14, 8),
        ("free_requested", 1, 30, 7),
        ("free_completed", 1, 30, 7),
        ("alloc", 7, 26, 7),
    )
    assert found.watched(forward)() == "done"
    assert not found.is_known
    assert found.watched_backward(backward)() == "done"
    assert found.is_known
    assert gpu.history == ["all", None, "all", None]
    assert found.laid_out(gpu.does())() == "done"
    main, side, _ = gpu.streams
    assert gpu.segments == [(30 * MIB, main), (28 * MIB, side)]
    assert side.waited == [main], "only what takes part in a recording has its memory"
    assert main.waited == [side], "and must be joined"


@pytest.mark.parametrize(("torchs", "is_known"), [(28, False), (30, False), (30.5, True), (2, False)])
def test_what_gains_nothing_stays_as_it_is(gpu: Gpu, torchs: float, is_known: bool) -> None:
    """Segments of small tensors, of up to 2 MiB, do not count."""
    taken = ("segment_alloc", 0, torchs, 7), ("alloc", 1, 30, 7)
    assert both(Packing(), gpu.does(*taken), gpu.does()).is_known == is_known


def test_a_network_of_small_tensors(gpu: Gpu) -> None:
    assert not both(Packing(), gpu.does(*LOOSE, ("alloc", 1, 1, 7)), gpu.does()).is_known


def test_a_forward_that_is_recorded_again_counts_once(gpu: Gpu) -> None:
    found = Packing()
    forward = gpu.does(*LOOSE, ("alloc", 1, 30, 7))
    found.watched(forward)()
    assert both(found, forward, gpu.does())._sizes == {7: 30 * MIB}


def test_a_backward_that_fails_tells_nothing(gpu: Gpu) -> None:
    found = Packing()
    found.watched(gpu.does(*LOOSE, ("alloc", 1, 30, 7)))()

    def fails() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        found.watched_backward(fails)()
    assert not found.is_known
    assert gpu.history[-1] is None


@pytest.mark.parametrize(
    "setting",
    [{"max_split_size": 64 * MIB}, {"expandable_segments": True}, {"roundup_power2_divisions": {"1": 0, "2": 4}}],
)
@pytest.mark.parametrize("half", [0, 1, None])
def test_settings_with_which_it_would_not_fit(gpu: Gpu, setting: dict[str, Any], half: int | None) -> None:
    """In one half, too."""
    usual = gpu.settings

    def under(settings: dict[str, Any], does: Callable[[], str]) -> Callable[[], str]:
        def run() -> str:
            gpu.settings = settings
            return does()

        return run

    settings = [usual | setting if half in (None, i) else usual for i in range(2)]
    does = gpu.does(*LOOSE, ("alloc", 1, 30, 7))
    assert both(Packing(), under(usual, does), under(usual, does)).is_known
    assert not both(Packing(), under(settings[0], does), under(settings[1], does)).is_known


def test_settings_that_torch_does_not_tell(gpu: Gpu) -> None:
    gpu.settings = {}
    does = gpu.does(*LOOSE, ("alloc", 1, 30, 7))
    assert not both(Packing(), does, does).is_known


@pytest.mark.parametrize("half", [0, 1, None])
def test_a_history_of_the_script_stays(gpu: Gpu, half: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([half in (None, 0), half in (None, 1)])
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: next(asked))
    does = gpu.does(*LOOSE, ("alloc", 1, 30, 7))
    assert not both(Packing(), does, does).is_known
    assert len(gpu.history) == (0 if half is None else 2)


class Known(Packing):
    """One that knows its sizes after a backward; what fails is to be laid out."""

    laid = 0
    fails = ""

    def watched_backward(self, backward: Callable[[], Any]) -> Callable[[], Any]:
        self._is_complete, self._sizes = True, {1: MIB}
        return backward

    def laid_out(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        Known.laid += 1
        if Known.fails == "forward":
            raise torch.OutOfMemoryError("no memory for segments")
        return forward


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, whose memory is packed after three steps that are alike."""
    monkeypatch.setattr(replay, "Packing", Known)
    monkeypatch.setattr(Known, "laid", 0)
    return noted(monkeypatch, thrift_after=3)


def test_it_is_recorded_once_more_when_sizes_are_known(made: list[Captured]) -> None:
    pair = Pair(on_captured, three, calls=6)
    assert made[0].thrift.frees
    assert not Known.laid
    for _ in range(12):
        pair.both(step)
    assert Known.laid == 1
    assert made[0].replays == 16
    assert made[0]._bodies[0].is_packed


def moved(model: nn.Module) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return step(model)


def test_recorded_anew_it_is_packed_at_once(made: list[Captured]) -> None:
    pair = Pair(on_captured, three, calls=8)
    assert Known.laid == 1
    pair.both(moved)
    for _ in range(3):
        pair.both(step)
    assert Known.laid == 2
    assert made[0]._bodies[0].is_packed


def test_under_other_settings_it_is_watched_anew(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(on_captured, three, calls=8)
    first = made[0]._bodies[0].packing
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    for _ in range(4):
        pair.both(step)
    assert Known.laid == 2
    assert made[0]._bodies[0].is_packed
    assert made[0]._bodies[0].packing is not first


def test_without_thrift_it_is_not_packed(made: list[Captured]) -> None:
    pair = Pair(on_captured, three, calls=8)
    pair.both(kept_graph)
    for _ in range(6):
        pair.both(step)
    assert not made[0].thrift.frees
    assert not made[0]._bodies[0].is_packed
    assert Known.laid == 1


def test_what_cannot_be_laid_out_keeps_its_thrift(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "fails", "forward")
    pair = Pair(on_captured, three, calls=8)
    for _ in range(6):
        pair.both(step)
    assert Known.laid == 1
    assert made[0].replays == 12, "in the same step"
    assert made[0].thrift.frees
    assert made[0]._bodies[0].thrift.frees
    assert not made[0]._bodies[0].is_packed


def test_a_packed_backward_that_cannot_be_recorded(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    record = Repeater.record

    def recorded(self: Repeater, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        if forward is not None and Known.laid == 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("no memory for a recording")
        return record(self, function, forward)

    failed: list[int] = []
    monkeypatch.setattr(Repeater, "record", recorded)
    pair = Pair(on_captured, three, calls=8)
    for _ in range(6):
        pair.both(step)
    assert failed
    assert made[0].replays == 12
    assert made[0]._bodies[0].thrift.frees
    assert not made[0]._bodies[0].is_packed
    assert Known.laid == 1
