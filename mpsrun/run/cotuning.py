"""Convolutions tuned where they will run: on their lane, with its share of the GPU, and beside their siblings.

With `torch.backends.cudnn.benchmark` torch times cuDNN's algorithms when a thread meets a convolution for the first
time, and keeps the fastest for that thread. Alone that is often one which takes all registers or all shared memory, and
leaves nothing to whatever runs at the same time. So the recordings of a plan are made in a thread of their own, which
has met each convolution of a branch while the branch's siblings were running.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from mpsrun import log
from mpsrun.errors import NotShippable
from mpsrun.graph.regions import Branch
from mpsrun.graph.state import applied
from mpsrun.plan.shares import EVERYWHERE, places_of
from mpsrun.run import demand
from mpsrun.run import state as modes
from mpsrun.run.lower import Lowered
from mpsrun.run.plainrun import PlainRun, generators
from mpsrun.run.profile import Profiler, undisturbed
from mpsrun.run.recorder import CudaRecorder, Recorder, Recording, Repeater, give_back_memory, settle
from mpsrun.run.streams import open_sides

Result = TypeVar("Result")
LIMIT_S = 20.0  # no siblings are tuned later; the script waits meanwhile
START_S = 10.0  # until siblings are under way
QUEUED = 2  # replays of each of them that are submitted ahead
ROOM_OF_MOVED = 2  # a branch needs no more memory than so many times the bytes that its ops move
TOLD = 3  # kernels that are named


@dataclass(frozen=True, eq=False)
class Laned:
    """A branch on its lane. group: branches of one group are siblings; place: where its share is, in percent.

    step: forward and backward of the branch by itself; bytes: that its ops move. has_convolutions: whether there is
    anything to tune.
    """

    group: int
    lane: int
    place: tuple[int, int]
    step: Callable[[], None]
    bytes: int
    has_convolutions: bool


def has_convolutions(branch: Branch) -> bool:
    """Whether cuDNN has algorithms to choose from."""
    return any("conv" in getattr(node.target, "__name__", str(node.target)) for node in branch.nodes)


def laned(regions: Sequence[Lowered], profiler: Profiler) -> list[Laned]:
    """The branches of these regions that are on lanes. Raises `NotShippable` where one cannot run by itself."""
    found = []
    for lowered in regions:
        place_of = places_of(lowered.assignment)
        for branch, lane in zip(lowered.region.branches, lowered.assignment.lanes, strict=True):
            place = place_of.get(lane, EVERYWHERE)
            step = profiler.step(branch)
            found.append(Laned(lowered.region.index, lane, place, step, branch.bytes, has_convolutions(branch)))
    return found


def whole(plain: PlainRun, args: Sequence[Any], run_graph: Callable[..., Any] | None = None) -> Callable[[], None]:
    """Forward and backward of a whole graph on the arguments of a call, without a trace; `run_graph` in its place."""

    def run() -> None:
        values = plain.copy(args)
        result = plain.run(values, generators())[0] if run_graph is None else run_graph(*values)
        ends = [end for end in result if isinstance(end, torch.Tensor) and end.requires_grad]
        wanted = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
        if ends and wanted:
            torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends], allow_unused=True)

    return run


class Thread:
    """A thread that runs one function after the other, with what torch keeps for it alone.

    Backward runs in it, too, not in autograd's own threads. It ends with this object.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mpsrun-tuning")

    def run(self, function: Callable[[], Result]) -> Result:
        """The result of `function` under the caller's modes; raises what it raises."""
        state = modes.ambient(self._kind)

        def run() -> Result:
            with applied(state), torch.autograd.set_multithreading_enabled(False):
                return function()

        return self._pool.submit(run).result()


class TunedRecorder:
    """Makes recordings in the thread that the convolutions were tuned in."""

    def __init__(self, recorder: Recorder, thread: Thread) -> None:
        self._recorder, self._thread = recorder, thread

    @property
    def era(self) -> object:
        return self._recorder.era

    @property
    def has_workers(self) -> bool:
        return self._recorder.has_workers

    def make_room(self) -> None:
        self._recorder.make_room()

    def follow(self) -> None:
        self._recorder.follow()

    def record(self, function: Callable[[], Any], forward: Recording | None = None) -> Recording:
        return self._thread.run(lambda: self._recorder.record(function, forward))


def tuned(
    recorder: Recorder,
    device: torch.device,
    branches: Sequence[Laned],
    rest: Callable[[], None],
    workspace_bytes: int,
) -> Recorder:
    """A recorder whose recordings have convolutions that were tuned beside each other.

    rest: runs the whole graph once, for what belongs to no branch. workspace_bytes: what an algorithm may take for
    itself. Branches that are not done after `LIMIT_S` are tuned alone. Says in one line which kernels are others than
    were chosen alone. Where a branch cannot be recorded or there is no memory, it says so and returns `recorder`.
    """
    kind, deadline_s = device.type, time.monotonic() + LIMIT_S
    alone, together = Thread(kind), Thread(kind)
    try:
        with undisturbed(kind), modes.choosing(by_time=True), _apart(device):
            for group in dict.fromkeys(branch.group for branch in branches):
                siblings = [branch for branch in branches if branch.group == group]
                if any(branch.has_convolutions for branch in siblings) and time.monotonic() < deadline_s:
                    _tune(siblings, device, alone, together, workspace_bytes)
            together.run(rest)
            if kind == "cuda":
                _tell(branches, device, alone, together)
    except (RuntimeError, NotShippable) as error:
        log.say(f"convolutions keep the algorithms that are fastest alone ({type(error).__name__}: {error})")
        return recorder
    return TunedRecorder(recorder, together)


def _tune(
    siblings: Sequence[Laned], device: torch.device, alone: Thread, together: Thread, workspace_bytes: int
) -> None:
    loads = {branch: _load(branch, device, alone) for branch in siblings}
    for branch in siblings:
        if branch.has_convolutions:
            others = [load for other, load in loads.items() if other is not branch]
            most_bytes = workspace_bytes + ROOM_OF_MOVED * branch.bytes
            with _at_most(device, most_bytes), _busy(others, device):
                together.run(partial(_on_lane, branch, device))


def _on_lane(branch: Laned, device: torch.device) -> None:
    sides = open_sides(device, [(branch.lane, ())], {branch.lane: branch.place})
    try:
        sides.use(branch.lane)
        branch.step()
    finally:
        sides.join(())


def _load(branch: Laned, device: torch.device, thread: Thread) -> Recording:
    """A branch as a recording with memory of its own, so that it may be replayed beside others."""
    recorder = CudaRecorder(device) if device.type == "cuda" else Repeater()

    def make() -> Recording:
        _on_lane(branch, device)
        return recorder.record(lambda: _on_lane(branch, device))

    return thread.run(make)


@contextlib.contextmanager
def _busy(recordings: Sequence[Recording], device: torch.device) -> Iterator[None]:
    """Replay these all the time, at the same time."""
    if not recordings:
        yield
        return
    stop, started = threading.Event(), threading.Event()

    def replay() -> None:
        lanes = [(recording, _stream(device), deque[torch.cuda.Event]()) for recording in recordings]
        while not stop.is_set():
            for recording, stream, ahead in lanes:
                with stream:
                    recording.replay()
                    if device.type == "cuda":
                        ahead.append(torch.cuda.current_stream(device).record_event())
                if len(ahead) > QUEUED:
                    ahead.popleft().synchronize()
            started.set()
        for _, _, ahead in lanes:
            for event in ahead:
                event.synchronize()

    thread = threading.Thread(target=replay, name="mpsrun-siblings", daemon=True)
    thread.start()
    try:
        if not started.wait(START_S):
            raise NotShippable(f"its siblings were not under way after {START_S:g} s")
        yield
    finally:
        stop.set()
        thread.join(START_S)


def _stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Nothing of the script is under way before, and nothing of these threads afterwards: both use the parameters."""
    if device.type == "cuda":
        settle(device)
    yield
    if device.type == "cuda":
        settle(device)


@contextlib.contextmanager
def _at_most(device: torch.device, more_bytes: int) -> Iterator[None]:
    """Let this process take no more than so much more of the GPU's memory: larger workspaces are then left out."""
    if device.type != "cuda":
        yield
        return
    give_back_memory()
    before = torch.cuda.get_per_process_memory_fraction(device)
    most_bytes = torch.cuda.memory_reserved(device) + more_bytes
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, most_bytes / total_bytes), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _tell(branches: Sequence[Laned], device: torch.device, alone: Thread, together: Thread) -> None:
    def all_of(thread: Thread) -> None:
        for branch in branches:
            thread.run(partial(_on_lane, branch, device))

    before, after = (demand.kernel_names(partial(all_of, thread)) for thread in (alone, together))
    if before is not None and after is not None:
        log.say(difference(before, after))


def difference(alone: Counter[str], together: Counter[str]) -> str:
    """One line about the kernels that were chosen beside siblings instead of those that were chosen alone."""
    others, given_up = together - alone, alone - together
    if not others:
        return "convolutions beside their siblings: the same kernels as alone"
    count = f"{others.total()} of {together.total()} kernels are others than alone"
    chosen, instead = (
        ", ".join(f"{n} x {name[:60]}" for name, n in names.most_common(TOLD)) for names in (others, given_up)
    )
    return f"convolutions beside their siblings: {count}: {chosen} instead of {instead or 'nothing'}"
