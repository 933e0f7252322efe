"""Which workspaces of cuBLAS recordings have, and that they stay, with an allocator and a cuBLAS that are made up."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpsrun.run.workspaces import Workspaces

DEVICE = torch.device("cuda", 0)
SIZE_BYTES = 32 << 20


class Allocator:
    """blocks: (pool, stream, bytes) of what is in use. handles: the streams that cuBLAS has a workspace for, and where.

    size_bytes: of a workspace.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int]] = []
        self.handles: dict[int, str] = {}
        self.size_bytes = SIZE_BYTES
        self.pool, self.stream = "default", 0

    @contextlib.contextmanager
    def into(self, pool: Any, _device: torch.device) -> Iterator[None]:
        self.pool = pool.name
        yield
        self.pool = "default"

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.cuda_stream
        yield
        self.stream = before

    def multiply(self) -> None:
        """What a product of matrices takes, and `current_blas_handle`, too."""
        if self.stream not in self.handles:
            self.handles[self.stream] = self.pool
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
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
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
    return made


def test_the_main_stream_has_one_and_lanes_that_multiply(allocator: Allocator) -> None:
    with allocator.on(PLAIN[1]):
        allocator.multiply()
    allocator.blocks += [("default", 2, SIZE_BYTES - 1), ("default", 9, SIZE_BYTES)]
    workspaces = Workspaces(DEVICE)
    for _ in range(2):
        workspaces.provide(MAIN, SIDES)
        assert allocator.handles == {4: "default", 1: "own", 5: "own"}
        assert len(allocator.blocks) == 5
    with allocator.on(PLAIN[0]):
        allocator.multiply()
    workspaces.provide(MAIN, SIDES)
    assert allocator.handles == {4: "default", 2: "default", 1: "own", 5: "own", 3: "own"}


def test_what_was_cleared_is_taken_again(allocator: Allocator) -> None:
    """As by Inductor, or with the first recording."""
    with allocator.on(PLAIN[0]):
        allocator.multiply()
    workspaces = Workspaces(DEVICE)
    workspaces.provide(MAIN, SIDES)
    allocator.handles, allocator.blocks = {}, []
    workspaces.provide(MAIN, SIDES)
    assert allocator.handles == {1: "own", 3: "own"}


def test_where_cublas_has_none_nothing_is_looked_for(allocator: Allocator) -> None:
    """As with CUBLAS_WORKSPACE_CONFIG=:0:0; a block of no bytes is nobody's."""
    allocator.size_bytes = 0
    allocator.blocks = [("default", 2, 0)]
    Workspaces(DEVICE).provide(MAIN, SIDES)
    assert allocator.handles == {1: "own"}


def test_allocators_without_pools_are_left_alone(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    Workspaces(DEVICE).provide(MAIN, SIDES)
    assert not allocator.handles
