"""Captured lanes on a GPU: what is replayed is what plain PyTorch computes, call after call."""

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captures import habits, noted, on_captured
from networks import SMALL, Three, why_not_here
from torch import Tensor, nn
from transparency import assert_same, moved, trained

from mpsrun.run.captured import Captured
from mpsrun.run.recorder import CudaRecorder, Recording
from mpsrun.run.streams import CudaSides, side_streams

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}
LONG = 20_000_000  # cycles of the GPU: some 10 ms


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, which start with thrift after four steps that are alike."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return noted(monkeypatch, thrift_after=4)


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_small_networks(daemon: None, made: list[Captured], sides: None, name: str) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on_captured(copy.deepcopy(plain.model)))
    with torch._dynamo.config.patch(allow_rnn=True):
        for step in range(5):
            given = tuple(moved(x, "cuda", torch.float64) for x in case.inputs())
            assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    # The backward of `prod` waits for the GPU.
    assert [graph.replays for graph in made] == [1 if name == "batch norm" else 3]


def losses(
    model: nn.Module, steps: int, autocast: torch.dtype | None = None, seed: int = 0, lr: float = 0.01
) -> list[float]:
    """A loop that keeps its last loss, as most do."""
    torch.manual_seed(seed)
    generator = torch.Generator("cuda").manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    dtype = next(model.parameters()).dtype
    found = []
    for _ in range(steps):
        x = torch.randn(16, 6, device="cuda", generator=generator, dtype=dtype)
        optimizer.zero_grad()
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


class Noisy(nn.Module):
    """Branches that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Three(64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.drop(x)) + self.drop(x).sum()


MADE = {"three": lambda: Three(64), "large gradients": lambda: Three(8192), "dropout": Noisy}


@pytest.mark.parametrize("make", MADE.values(), ids=[*MADE])
def test_loss_curve_is_the_plain_one(daemon: None, made: list[Captured], make: Callable[[], nn.Module]) -> None:
    """Random numbers, too: the generator moves as in plain PyTorch."""
    torch.manual_seed(0)
    plain = make().to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    assert losses(fast, 20) == pytest.approx(losses(plain, 20), rel=1e-9)
    assert made[0].replays == 18


class Views(nn.Module):
    """An encoder that is called for two views before the backward of both."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) * self.encoder(x.flip(0))


@pytest.mark.parametrize("width", [64, 8192])
def test_two_calls_before_a_backward(daemon: None, made: list[Captured], width: int) -> None:
    """Each has a recording of its own, with its own memory."""
    torch.manual_seed(0)
    plain = Three(width).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    assert losses(Views(fast), 40, lr=1e-4) == pytest.approx(losses(Views(plain), 40, lr=1e-4), rel=1e-9)
    assert made[0].replays == 78, "all calls but those of the first step"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(daemon: None, made: list[Captured], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Three(64).to("cuda")
    fast = on_captured(copy.deepcopy(plain))
    assert losses(fast, 20, dtype) == pytest.approx(losses(plain, 20, dtype), rel=1e-3)
    assert made[0].replays == 18


def test_gradients_that_another_thread_asks_for(daemon: None, made: list[Captured]) -> None:
    """It has called no network, so that its backwards come in autograd's own thread."""
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    losses(fast, 3, lr=0.0)
    losses(plain, 3, lr=0.0)
    x = torch.randn(16, 6, device="cuda", dtype=torch.float64)
    found = []
    with ThreadPoolExecutor(1) as threads:
        for model in (fast, plain):
            model.zero_grad()
            threads.submit(model(x).square().sum().backward).result()
            asked = threads.submit(torch.autograd.grad, model(x).square().sum(), [*model.parameters()]).result()
            found.append([*asked, *(p.grad for p in model.parameters())])
    assert made[0].replays == 3
    torch.testing.assert_close(*found, **EXACT)


def test_habits(daemon: None, made: list[Captured]) -> None:
    """Two forwards before a backward, kept graphs, gradients of gradients, evaluation, other streams, moved weights."""
    torch.manual_seed(0)
    plain = Three(16).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    generator = torch.Generator("cuda").manual_seed(2)
    for turn in range(4):
        batches = [torch.randn(5, 6, device="cuda", dtype=torch.float64, generator=generator) for _ in range(3)]
        found, wanted = (habits(model, batches, turn, slopes=True) for model in (fast, plain))
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b, msg=lambda text, at=(turn, i): f"{at}: {text}", **EXACT)
    assert sum(graph.replays for graph in made) >= 8


def test_a_host_sync_runs_uncaptured(daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture does not allow leaves the GPU, the generator and the network as they were."""
    use = CudaSides.use

    def waiting(self: CudaSides, lane: int) -> None:
        use(self, lane)
        torch.cuda.synchronize()

    monkeypatch.setattr(CudaSides, "use", waiting)
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    assert losses(fast, 6) == pytest.approx(losses(plain, 6), rel=1e-9)
    assert made[0].replays == 0


def test_a_capture_that_fails_leaves_no_memory_behind(daemon: None) -> None:
    made = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    block = torch.ones(1 << 20, device="cuda")

    def doubled() -> Tensor:
        return torch.cat([block] * 64) * 2.0  # 256 MiB, twice

    def waiting() -> Tensor:
        kept = doubled()
        torch.cuda.synchronize()
        return kept

    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    made.record(doubled)  # what other tests have left is gone after that
    before = held()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            made.record(waiting)
        assert held() == before
    forward = made.record(doubled)
    with pytest.raises(RuntimeError):
        made.record(waiting, forward)
    assert forward.replay().sum().item() == 2.0 * 64 * (1 << 20)
    assert held() > before
    del forward
    assert held() == before


def test_a_backward_that_cannot_be_captured(
    daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs op by op, forward anew; later steps run uncaptured."""
    record = CudaRecorder.record
    calls: list[object] = []

    def once(self: CudaRecorder, function: Callable[[], object], forward: Recording | None = None) -> object:
        calls.append(function)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory for a recording")
        return record(self, function, forward)

    monkeypatch.setattr(CudaRecorder, "record", once)
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    assert losses(fast, 8) == pytest.approx(losses(plain, 8), rel=1e-9)
    assert made[0].replays == 1
    assert len(calls) == 2


def test_no_room_beside_a_recording(
    daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device=None: (0, 80 << 30))
    losses(on_captured(Three(64).to("cuda")), 4)
    assert made[0].replays == 0
    assert "a recording and a step beside it" in capfd.readouterr().err


def test_random_numbers_of_steps_that_are_recorded_behind_others(daemon: None, made: list[Captured]) -> None:
    """What is still to be computed draws from where its own step was in the sequence."""
    torch.manual_seed(0)
    plain = Noisy().to("cuda", torch.float64)
    seen = []
    for model in (plain, on_captured(copy.deepcopy(plain))):
        torch.manual_seed(1)
        found = []
        for _ in range(10):
            torch.cuda._sleep(LONG)
            loss = model(torch.ones(16, 6, device="cuda", dtype=torch.float64)).square().mean()
            loss.backward()
            found.append(loss.detach())
            model.zero_grad()
        seen.append(torch.stack(found))
    torch.testing.assert_close(seen[1], seen[0], **EXACT)
    assert made[0].replays == 8


def evaluation(batches: int) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A network, the same on captured lanes, and what they are called with."""
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    given = [torch.randn(16, 6, device="cuda", dtype=torch.float64) for _ in range(batches)]
    return plain, on_captured(copy.deepcopy(plain)), given


def assert_outputs(plain: nn.Module, batches: list[Tensor], found: list[Tensor]) -> None:
    with torch.no_grad():
        for got, batch in zip(found, batches, strict=True):
            torch.testing.assert_close(got, plain(batch), **EXACT)


def test_two_streams_that_nobody_orders(daemon: None, made: list[Captured]) -> None:
    """The second call has to wait until the first has read its inputs."""
    plain, fast, batches = evaluation(8)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(LONG * (i % 2))
                found.append(fast(batch))
    torch.cuda.synchronize()
    assert_outputs(plain, batches, found)
    assert made[0].replays == 6


def test_one_thread_records_while_another_runs_op_by_op(daemon: None, made: list[Captured]) -> None:
    plain, fast, batches = evaluation(40)
    torch.cuda.synchronize()

    def evaluated(of: list[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            found = [fast(batch) for batch in of]
            torch.cuda.current_stream().synchronize()
            return found

    with ThreadPoolExecutor(2) as threads:
        found = [result for half in threads.map(evaluated, (batches[:20], batches[20:])) for result in half]
    assert_outputs(plain, batches, found)
    assert any(captured.replays for captured in made)  # each thread may have had the network compiled


def test_nothing_is_recorded_on_a_stream_of_the_script(daemon: None, made: list[Captured]) -> None:
    """Else what another thread does there, as one that copies batches ahead, would become a part of the recording."""
    _, fast, batches = evaluation(4)
    with torch.no_grad():
        for batch in batches:
            fast(batch)
    assert made[0].replays
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = made[0]._recorder
    assert isinstance(recorder, CudaRecorder)
    recorded_on = {stream.cuda_stream for stream in [recorder._stream, *(side for _, side in side_streams(device))]}
    assert len(recorded_on) > 2
    assert recorded_on.isdisjoint({torch.cuda.Stream(priority=i % 2 - 1).cuda_stream for i in range(128)})


def split(long: Tensor) -> Tensor:
    """A sum so long that cuBLAS splits it, for which it needs memory of its own."""
    return long @ long.T


def given_back() -> list[Tensor]:
    """What nobody has any more goes back to the GPU, and is used for these."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]


def test_a_recording_outlives_those_before_it(daemon: None) -> None:
    made = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    long = torch.randn(64, 1 << 18, device="cuda")
    split(long).sum().item()  # cuBLAS is there
    first, second = made.record(lambda: split(long)), made.record(lambda: split(long))
    first.replay()
    wanted = second.replay().clone()
    del first
    torch._C._cuda_clearCublasWorkspaces()  # as Inductor does; torch from 2.12 on does it for the first one's stream
    blocks = given_back()
    assert torch.equal(second.replay(), wanted)
    assert all(block.isnan().all() for block in blocks)


class Splitting(nn.Module):
    """Branches that need memory of cuBLAS's, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, long: Tensor) -> Tensor:
        long = long * self.scale
        halves = long.chunk(2)
        return torch.cat([split(halves[0]).relu(), split(halves[1]).relu()])


def used() -> set[tuple[int, int]]:
    """(stream, address) of what torch's allocator has given to somebody."""
    return {
        (segment["stream"], block["address"])
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }


def test_workspaces_of_cublas_stay(daemon: None, made: list[Captured]) -> None:
    """Those of a script's own graph, whatever is recorded, and those of recordings, whoever clears all of them."""
    long = torch.randn(128, 1 << 18, device="cuda")
    script, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(script):
        wanted = split(long).clone()  # takes the workspace that the graph will know
        before = {block for block in used() if block[0] == script.cuda_stream}
    with torch.cuda.graph(graph, stream=script):
        found = split(long)
    plain = Splitting().to("cuda")
    first, fast = (on_captured(copy.deepcopy(plain)) for _ in range(2))
    losses_of = lambda model: [step(model, long) for _ in range(6)]  # noqa: E731
    for model in (first, fast):
        assert losses_of(model) == pytest.approx(losses_of(plain), rel=1e-5)
    assert all(graph.replays for graph in made)
    assert before
    assert before <= used(), "the workspace that the script's graph works in"
    blocks = given_back()
    graph.replay()
    assert torch.equal(found, wanted)
    made[0]._bodies.clear()  # with which goes the memory that the first of them was recorded in
    torch._C._cuda_clearCublasWorkspaces()
    blocks += given_back()
    assert losses_of(fast) == pytest.approx(losses_of(plain), rel=1e-5)
    assert all(block.isnan().all() for block in blocks)


def step(model: nn.Module, x: Tensor) -> float:
    """A training step; returns the loss."""
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.item()


def test_large_gradients_stay_valid(daemon: None, made: list[Captured]) -> None:
    """Handed out without a copy while the script drops them, they are the script's all the same, whatever it does."""
    torch.manual_seed(0)
    plain = Three(8192).to("cuda", torch.float64)
    fast = on_captured(copy.deepcopy(plain))
    seen = []
    for model in (plain, fast):
        torch.manual_seed(1)
        kept, found = [], []
        for step in range(48):
            if step % 24 < 20:
                model.zero_grad()
            loss = model(torch.randn(16, 6, device="cuda", dtype=torch.float64)).square().mean()
            loss.backward()
            with torch.no_grad():
                model(torch.randn(16, 6, device="cuda", dtype=torch.float64))
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            if step in (18, 19, 42):
                kept.append([p.grad for p in model.parameters() if p.grad is not None])
        seen.append(found + kept)
    for i, (wanted, got) in enumerate(zip(*seen, strict=True)):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, at=i: f"{at}: {text}", **EXACT)
    assert made[0].replays == 46
    assert made[0].thrift == (True, False)  # those that were kept had been lent


class Deep(nn.Module):
    """Two branches with 16 MiB of activations and 4 MiB of parameters a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 1024)
        self.left, self.right = (nn.Sequential(*(self._layer() for _ in range(8))) for _ in range(2))
        self.outward = nn.Linear(1024, 1)

    @staticmethod
    def _layer() -> nn.Module:
        return nn.Sequential(nn.Linear(1024, 1024), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        return self.outward(self.left(x) + self.right(x))


def test_backward_uses_the_memory_of_activations_again(daemon: None, made: list[Captured]) -> None:
    """Gradients are where activations were, as in plain PyTorch; where a script keeps graphs, they are beside them."""

    def pool_bytes(keep: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        fast = on_captured(Deep().cuda())
        for _ in range(10):
            fast(torch.randn(4096, 6, device="cuda")).sum().backward(retain_graph=keep)
            fast.zero_grad()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    pool_bytes(keep=True)  # what is set up at first use
    assert pool_bytes(keep=False) < pool_bytes(keep=True) - (32 << 20)
    assert sum(graph.replays for graph in made) >= 24


def test_memory_stays_flat(daemon: None, made: list[Captured]) -> None:
    fast = on_captured(Three(64).to("cuda"))
    losses(fast, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses(fast, 200)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 1024
