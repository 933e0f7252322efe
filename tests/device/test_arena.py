"""Slots: never handed out twice, used again, and laid out where their tensors say."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsrun.device import ChunkHandle, CpuDevice, TensorRef
from mpsrun.device.arena import ALIGN_BYTES, MIN_CHUNK_BYTES, Arena, Room, size_class, slot_view


def arena() -> tuple[Arena, list[ChunkHandle]]:
    announced: list[ChunkHandle] = []
    return Arena(CpuDevice(), announced.append), announced


@given(st.integers(0, 1 << 40))
def test_size_classes(size_bytes: int) -> None:
    """Large enough, aligned, and at most an eighth too large."""
    found = size_class(size_bytes)
    assert found >= max(size_bytes, ALIGN_BYTES)
    assert found % ALIGN_BYTES == 0
    assert found <= max(size_bytes * 9 / 8 + 1, size_bytes + ALIGN_BYTES)
    assert size_class(found) == found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300_000)), max_size=60))
def test_slots_never_overlap(events: list[tuple[bool, int]]) -> None:
    taker, _ = arena()
    held: list[Room] = []
    for take, size in events:
        if take or not held:
            held.append(taker.take(size))
            assert held[-1].size_bytes >= size
        else:
            taker.give_back(held.pop(size % len(held)), 0)
        assert taker.in_use == len(held)
        spans = sorted((room.chunk.id, room.offset_bytes, room.size_bytes) for room in held)
        for (chunk, start, length), (other, following, _) in itertools.pairwise(spans):
            assert chunk != other or start + length <= following


def test_warm_arena_allocates_nothing() -> None:
    taker, announced = arena()
    sizes = [1000, 5000, 100_000]
    for _ in range(100):
        rooms = [taker.take(size) for size in sizes]
        for room in rooms:
            taker.give_back(room, 0)
    assert len(announced) == 1
    assert taker.in_use == 0


def test_growth_is_announced() -> None:
    taker, announced = arena()
    first, second = taker.take(MIN_CHUNK_BYTES), taker.take(3 * MIN_CHUNK_BYTES)
    assert [handle.id for handle in announced] == [first.chunk.id, second.chunk.id]
    assert announced[1].size_bytes >= 3 * MIN_CHUNK_BYTES


def test_slot_of_another_stream_is_not_taken() -> None:
    """Only the order of its own stream separates a slot's old readers from its new writer."""
    taker, _ = arena()
    room = taker.take(1000)
    taker.give_back(room, 7)
    assert taker.take(1000) is not room


def test_pending_work_travels_with_the_slot() -> None:
    taker, _ = arena()
    taker.give_back(taker.take(1000), 0, [(3, 17)])
    assert taker.take(1000).pending == [(3, 17)]


def test_views_are_made_once_and_in_place() -> None:
    taker, _ = arena()
    taker.take(1000)
    room = taker.take(4096)
    ref = TensorRef(0, 64, (2, 3), (1, 2), "float32")
    (view,) = room.tensors(1, "inputs", [ref])
    assert (view.shape, view.stride(), view.dtype) == ((2, 3), (1, 2), torch.float32)
    view.fill_(2.5)
    assert torch.equal(slot_view(room.chunk, room.offset_bytes, ref), view)
    assert room.tensors(1, "inputs", [ref])[0] is view
    assert view.data_ptr() == room.chunk.memory.data_ptr() + room.offset_bytes + 64
