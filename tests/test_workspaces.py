"""Which workspaces of cuBLAS recordings have, and that they stay, with an allocator and a cuBLAS that are made up."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpsrun.run import workspaces as module
from mpsrun.run.workspaces import Workspaces, workspaces

DEVICE = torch.device("cuda", 0)
SIZE_BYTES = 8_519_680  # any size will do: that of a GPU is not known before


class Allocator:
    """blocks: (pool, stream, bytes) of what is in use. held: by cuBLAS handle and stream, the pool of its workspace.

    handle: that of the present thread. size_bytes: of a workspace.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int]] = []
        self.held: dict[tuple[str, int], str] = {}
        self.size_bytes = SIZE_BYTES
        self.pool, self.stream, self.handle = "default", 0, "main"

    @contextlib.contextmanager
    def into(self, pool: Any, _device: torch.device) -> Iterator[None]:
        self.pool = pool.name
        try:
            yield
        finally:
            self.pool = "default"

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.cuda_stream
        try:
            yield
        finally:
            self.stream = before

    def multiply(self) -> None:
        """What a product of matrices takes, and `current_blas_handle`, too."""
        if (self.handle, self.stream) not in self.held:
            self.held[self.handle, self.stream] = self.pool
            self.blocks += [(self.pool, self.stream, self.size_bytes)] if self.size_bytes else []

    def snapshot(self, pool: str | None = None) -> list[dict[str, Any]]:
        freed = {"state": "inactive", "requested_size": SIZE_BYTES}
        return [
            {"stream": stream, "blocks": [freed, {"state": "active_allocated", "requested_size": size}]}
            for where, stream, size in self.blocks
            if pool in (None, where)
        ]


def stream(number: int) -> Any:
    return SimpleNamespace(cuda_stream=number)


MAIN, PLAIN, RECORDED = stream(1), [stream(2), stream(4)], [stream(3), stream(5)]
SIDES = [*zip(PLAIN, RECORDED, strict=True)]


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    made = Allocator()
    for name, value in {
        "get_allocator_backend": lambda: "native",
        "MemPool": lambda: SimpleNamespace(name="own", snapshot=lambda: made.snapshot("own")),
        "use_mem_pool": made.into,
        "stream": made.on,
        "current_blas_handle": made.multiply,
        "memory_snapshot": made.snapshot,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    module.workspaces.cache_clear()
    yield made
    module.workspaces.cache_clear()


def test_the_main_stream_has_one_and_lanes_that_multiply(allocator: Allocator) -> None:
    with allocator.on(PLAIN[1]):
        allocator.multiply()
    allocator.blocks += [("default", 2, SIZE_BYTES - 1), ("default", 9, SIZE_BYTES)]
    made = Workspaces(DEVICE)
    for _ in range(2):
        made.provide(MAIN, SIDES)
        assert allocator.held == {("main", 4): "default", ("main", 1): "own", ("main", 5): "own"}
        assert len(allocator.blocks) == 5
    with allocator.on(PLAIN[0]):
        allocator.multiply()
    made.provide(MAIN, SIDES)
    assert allocator.held["main", 3] == "own"


def test_what_was_cleared_is_taken_again(allocator: Allocator) -> None:
    """As by Inductor, or with the first recording."""
    with allocator.on(PLAIN[0]):
        allocator.multiply()
    made = Workspaces(DEVICE)
    made.provide(MAIN, SIDES)
    allocator.held, allocator.blocks = {}, []
    made.provide(MAIN, SIDES)
    assert allocator.held == {("main", 1): "own", ("main", 3): "own"}


def test_each_thread_has_its_own_from_the_same_place(allocator: Allocator) -> None:
    """Whichever recorder asks, as those that tuning makes and drops: side streams are the device's."""
    with allocator.on(PLAIN[0]):
        allocator.multiply()
    workspaces(DEVICE).provide(MAIN, SIDES)
    allocator.handle = "other"
    workspaces(DEVICE).provide(stream(6), SIDES)
    others = {where: pool for (handle, where), pool in allocator.held.items() if handle == "other"}
    assert others == {6: "own", 3: "own"}


def test_where_the_size_is_not_known_all_lanes_have_one(allocator: Allocator) -> None:
    """As where the main stream has had one before, or with CUBLAS_WORKSPACE_CONFIG=:0:0, when it takes nothing."""
    with allocator.on(MAIN):
        allocator.multiply()
    Workspaces(DEVICE).provide(MAIN, SIDES)
    assert allocator.held == {("main", 1): "default", ("main", 3): "own", ("main", 5): "own"}


def test_allocators_without_pools_have_them_before_anything_is_recorded(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would be taken while something is recorded, and be a part of that alone."""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    Workspaces(DEVICE).provide(MAIN, SIDES)
    assert allocator.held == {("main", 1): "default", ("main", 3): "default", ("main", 5): "default"}
