"""What recording and replaying ask of CUDA, and in which order, on a GPU that is made up."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from mpsrun.run import recorder
from mpsrun.run.recorder import CudaRecorder, give_back_memory, settle

DEVICE = torch.device("cuda", 0)


class Gpu:
    """Notes what is asked of it; fails: whether captures do; is_full: whether workspaces find no memory."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.streams = 0
        self.fails = self.is_full = False
        self.current: Stream = Stream(self, "script")

    def provide(self, main: "Stream", sides: object) -> None:
        assert (main.name, sides) == ("own", [])
        if self.is_full:
            raise torch.OutOfMemoryError("no memory for a workspace")
        self.asked.append("workspaces")

    def take(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked

    @contextlib.contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Stream:
    def __init__(self, gpu: Gpu, name: str) -> None:
        gpu.streams += 1
        self.gpu, self.name, self.cuda_stream = gpu, name, gpu.streams

    def synchronize(self) -> None:
        self.gpu.asked.append(f"wait for {self.name}")

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.asked.append(f"{self.name} behind {other.name}")


class Graph:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.ended = gpu, False

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.gpu.asked.append("begin")

    def capture_end(self) -> None:
        if self.gpu.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True
        self.gpu.asked.append("end")

    def pool(self) -> object:
        if not self.ended:
            raise RuntimeError("no capture has ended")
        return None

    def reset(self) -> None:
        self.gpu.asked.append("reset")

    def replay(self) -> None:
        self.gpu.asked.append(f"replay on {self.gpu.current.name}")


class Generator:
    def __init__(self, *_: object) -> None:
        self.state: Generator = self
        self.seed = self.offset = 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def manual_seed(self, seed: int) -> "Generator":
        self.seed = seed
        return self

    def set_offset(self, offset: int) -> None:
        self.offset = offset

    def graphsafe_set_state(self, state: "Generator") -> None:
        self.state = state


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    names = iter(("own", "other"))
    for name, value in {
        "CUDAGraph": lambda: Graph(made),
        "stream": made.on,
        "device": lambda _device: contextlib.nullcontext(),
        "current_stream": lambda _device=None: made.current,
        "graph_pool_handle": lambda: (0, 1),
        "default_generators": (Generator().manual_seed(7),),
        "synchronize": lambda _device=None: made.asked.append("wait for everything"),
        "empty_cache": lambda: made.asked.append("give back"),
        "max_memory_allocated": lambda _device: 0,
        "memory_allocated": lambda _device: 0,
        "mem_get_info": lambda _device: (1, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    torch.cuda.default_generators[0].set_offset(12)
    for name, told in {
        "_cuda_endAllocateToPool": "end the pool",
        "_cuda_releasePool": "release the pool",
    }.items():
        monkeypatch.setattr(torch._C, name, lambda *_, told=told: made.asked.append(told), raising=False)
    raw = lambda _index: made.current.cuda_stream  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw, raising=False)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(recorder, "side_streams", lambda _device: [])
    monkeypatch.setattr(recorder, "workspaces", lambda _device: made)
    monkeypatch.setattr(recorder, "_free", defaultdict(list))
    monkeypatch.setattr(recorder, "recorded_stream", lambda _device: Stream(made, next(names)))
    return made


def test_a_recording_waits_for_what_is_under_way_and_has_workspaces(gpu: Gpu) -> None:
    made = CudaRecorder(DEVICE)
    recording = made.record(lambda: gpu.asked.append(f"work on {gpu.current.name}"))
    work = ["workspaces", "wait for own", "begin", "work on own", "end"]
    assert gpu.take() == work
    recording.replay()
    assert gpu.take() == ["script behind own", "replay on script"]
    recording.replay()
    assert gpu.take() == ["replay on script"]
    made.record(lambda: gpu.asked.append(f"work on {gpu.current.name}"), recording)
    assert gpu.take() == [work[0], "wait for script", *work[2:]]
    recording.replay()
    assert gpu.take() == ["script behind own", "replay on script"], "behind what a capture sets back"


@pytest.mark.parametrize(
    "ask",
    [lambda made: made.make_room(), lambda _: settle(), lambda _: give_back_memory()],
    ids=["room", "wait", "give"],
)
def test_nothing_that_would_end_a_recording_comes_beside_it(gpu: Gpu, ask: Callable[[CudaRecorder], object]) -> None:
    made = CudaRecorder(DEVICE)
    asking = threading.Event()

    def other() -> None:
        asking.set()
        ask(made)

    thread = threading.Thread(target=other)

    def work() -> None:
        thread.start()
        asking.wait(10)
        thread.join(0.1)

    made.record(work)
    thread.join(10)
    recorded = ["workspaces", "wait for own", "begin", "end"]
    asked = gpu.take()
    assert asked[: len(recorded)] == recorded
    assert asked[len(recorded) :], "what the other thread asked for"


def test_a_stream_serves_again_when_its_recorder_is_gone(gpu: Gpu) -> None:
    first = CudaRecorder(DEVICE)
    second = CudaRecorder(DEVICE)
    assert first._stream is not second._stream
    left = first._stream
    del first
    assert CudaRecorder(DEVICE)._stream is left


def test_replays_follow_each_other_across_streams(gpu: Gpu) -> None:
    made = CudaRecorder(DEVICE)
    recording = made.record(lambda: None)
    recording.replay()
    gpu.take()
    with gpu.on(Stream(gpu, "second")):
        made.follow()
        assert gpu.take() == ["second behind script"], "before its inputs are overwritten"
        recording.replay()
        assert gpu.take() == ["replay on second"]
    made.follow()
    assert gpu.take() == ["script behind second"]


def test_without_memory_for_workspaces_nothing_begins(gpu: Gpu) -> None:
    """Other recordings stay good: the generator was not touched."""
    made = CudaRecorder(DEVICE)
    era, gpu.is_full = made.era, True
    with pytest.raises(torch.OutOfMemoryError):
        made.record(lambda: None)
    assert gpu.take() == []
    assert made.era == era


@pytest.mark.parametrize("releases", [False, True], ids=["torch 2.13", "torch 2.14"])
def test_a_capture_that_fails_gives_back_its_memory_once(
    gpu: Gpu, releases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "GRAPHS_RELEASE", releases)
    made = CudaRecorder(DEVICE)
    era = made.era
    gpu.fails = True

    def work() -> None:
        raise ValueError("in the function")

    with pytest.raises(ValueError, match="in the function"):
        made.record(work)
    given_back = ["reset"] if releases else ["end the pool", "release the pool"]
    assert gpu.take()[3:] == [*given_back, "end the pool"]
    assert made.era == era + 1
    state = torch.cuda.default_generators[0].state
    assert (state.seed, state.offset) == (7, 12)
    assert state is not torch.cuda.default_generators[0]
