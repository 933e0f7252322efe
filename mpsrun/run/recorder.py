"""Recordings: what a function submits to a GPU, kept as a CUDA graph that is replayed without its Python.

A recording runs in memory of its own; that of a backward pass is its forward's. Its results are the same tensors in
every replay, and hold what the last one computed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from mpsrun import log
from mpsrun.run.streams import recorded_stream, side_streams
from mpsrun.run.workspaces import workspaces

Function = Callable[[], Any]
GRAPHS_RELEASE = torch.__version__ >= "2.14"  # a graph whose capture has failed gives its memory back
_eras: Counter[torch.device] = Counter()
_free: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)  # streams whose recorders are gone
_alone = threading.RLock()  # held while something is recorded


class Recording(Protocol):
    """A function that was recorded."""

    def replay(self) -> Any:
        """Submit its work to the current stream; returns the function's results, which the next replay overwrites."""


def was_ended(error: BaseException) -> bool:
    """Whether a recording failed by what another thread did: by what its own did, CUDA says so at once."""
    return "previous error during capture" in str(error)


class Recorder(Protocol):
    """Makes recordings on one device."""

    @property
    def has_workers(self) -> bool:
        """Whether workers record their parts: one call at a time, and a backward runs once before it is recorded."""

    @property
    def era(self) -> object:
        """Recordings of another era are not to be replayed."""

    def make_room(self) -> None:
        """Before a recording. Raises `torch.OutOfMemoryError` where nothing would be left for other steps."""

    def follow(self) -> None:
        """Have the current stream wait for the last replay; to be asked before what one has read is overwritten."""

    def record(self, function: Function, forward: Recording | None = None) -> Recording:
        """Record what `function` submits, which is not computed yet. Raises whatever keeps it from being recorded.

        forward: the recording whose backward it is, if it is one.
        """


class CudaRecorder:
    """Records CUDA graphs, all on one stream, a forward with its backwards into one pool of memory.

    They may share a pool since their replays follow each other: `replay` puts them in order across streams.
    """

    has_workers = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free = _free[device]
        self._stream = free.pop() if free else recorded_stream(device)
        weakref.finalize(self, free.append, self._stream)
        self._last = self._stream  # that of the last replay
        self._lock = threading.Lock()  # a script may train in several threads

    @property
    def era(self) -> int:
        """How often the device's generator, which all recordings on it know, was replaced by another one."""
        return _eras[self._device]

    def make_room(self) -> None:
        """A recording keeps what a step needs at most; as much must be left for steps that run without it."""
        with _alone:
            self._last.synchronize()  # expandable segments are unmapped below whatever other streams still do there
            torch.cuda.empty_cache()  # nothing can be given back while something is recorded
        step_bytes = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        free_bytes = torch.cuda.mem_get_info(self._device)[0]
        if free_bytes < 2 * step_bytes:
            needed, free = step_bytes >> 20, free_bytes >> 20
            raise torch.OutOfMemoryError(
                f"a recording and a step beside it take {needed} MiB each, {free} MiB are free"
            )

    def record(self, function: Function, forward: Recording | None = None) -> Recording:
        """Other threads go on meanwhile: only what this one does must be fit for a graph."""
        pool: Any = forward.pool if isinstance(forward, _CudaRecording) else torch.cuda.graph_pool_handle()
        graph, begin_s = torch.cuda.CUDAGraph(), time.perf_counter()
        with _alone, self._lock, _uncollected(), self._on_stream():
            workspaces(self._device).provide(self._stream, side_streams(self._device))
            with restoring(self._device, pool):
                results = self._recorded(graph, pool, function)
        log.detail(f"a recording was made in {(time.perf_counter() - begin_s) * 1e3:.0f} ms")
        return _CudaRecording(self, graph, pool, results)

    def _recorded(self, graph: torch.cuda.CUDAGraph, pool: Any, function: Function) -> Any:
        """What `function` returns, while the graph records what it submits."""
        self._last.synchronize()  # its random ops still read what a capture resets
        self._last = self._stream
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results = function()
            self._join_sides()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a capture that has failed already
                self._end(graph, pool)
            raise
        self._end(graph, pool)
        return results

    def _end(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """End a capture; of one that has failed torch before 2.14 would keep the memory, which its graph owns."""
        try:
            graph.capture_end()
        except RuntimeError:
            if not _has_ended(graph):
                with contextlib.suppress(RuntimeError):  # where that went well, and what came after it failed
                    if GRAPHS_RELEASE:
                        graph.reset()
                    else:
                        torch._C._cuda_endAllocateToPool(self._device.index, pool)
                if not GRAPHS_RELEASE:
                    torch._C._cuda_releasePool(self._device.index, pool)
            raise

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def _join_sides(self) -> None:
        """Autograd waits for the streams that gradients come from, not for those of what nobody needed."""
        for _, stream in side_streams(self._device):
            with torch.cuda.stream(stream):
                forked = torch.cuda.is_current_stream_capturing()
            if forked:
                self._stream.wait_stream(stream)

    def follow(self) -> None:
        """Whatever stream the last replay of any graph was submitted to."""
        with self._lock:
            self._follow()

    def _follow(self) -> None:
        if torch._C._cuda_getCurrentRawStream(self._device.index) != self._last.cuda_stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._last)
            self._last = stream

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Submit a graph to the current stream, behind the last replay of any."""
        with self._lock:
            self._follow()
            graph.replay()


def alone() -> contextlib.AbstractContextManager[Any]:
    """Nothing is recorded meanwhile, but by this thread: for what waits for a device."""
    return _alone


def settle(device: torch.device | None = None) -> None:
    """Wait for all of a device (the current one); asked for meanwhile, it would end what another thread records."""
    with _alone:
        torch.cuda.synchronize(device)


def give_back_memory() -> None:
    """Give back what torch's allocator keeps for later, once nothing is under way or recorded."""
    with _alone:
        torch.cuda.synchronize()  # expandable segments are unmapped below what other streams still do there
        torch.cuda.empty_cache()


@contextlib.contextmanager
def restoring(device: torch.device, pool: tuple[int, int]) -> Iterator[None]:
    """After a failed capture into this pool, put right what torch leaves in its state: its allocator, its generator.

    The generator gets a new state, in the same place of the same sequence, which older recordings do not move.
    """
    source = torch.cuda.default_generators[device.index]
    seed, offset = source.initial_seed(), source.get_offset()
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # where it has ended
            torch._C._cuda_endAllocateToPool(device.index, pool)
        fresh = torch.Generator(device).manual_seed(seed)
        fresh.set_offset(offset)
        source.graphsafe_set_state(fresh)
        _eras[device] += 1
        raise


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a graph's capture was finished, even if the graph could not be made ready to run after that."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


class _CudaRecording:
    def __init__(self, owner: CudaRecorder, graph: torch.cuda.CUDAGraph, pool: Any, results: Any) -> None:
        self.pool = pool
        self._owner, self._graph, self._results = owner, graph, results

    def replay(self) -> Any:
        self._owner.replay(self._graph)
        return self._results


class Repeater:
    """A CPU has no graphs: a replay calls the function again. Everything around a recording is the same."""

    era, has_workers = 0, False

    def make_room(self) -> None:
        """There is no pool."""

    def follow(self) -> None:
        """There is one order only."""

    def record(self, function: Function, forward: Recording | None = None) -> Recording:  # noqa: ARG002
        """Nothing is computed yet."""
        return _Repeated(function)


class _Repeated:
    def __init__(self, function: Function) -> None:
        self._function = function

    def replay(self) -> Any:
        return self._function()


@functools.cache
def recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(device) if device.type == "cuda" else Repeater()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it may destroy an older graph, which would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
