"""Recordings with their memory in one piece a stream, on a GPU."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from captures import noted, on_captured
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mpsrun.run.captured import Captured
from mpsrun.run.packing import Packing

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, which start with thrift after four steps that are alike."""
    return noted(monkeypatch, thrift_after=4)


class Branches(nn.Module):
    """Six chains whose tensors have many sizes."""

    def __init__(self) -> None:
        super().__init__()
        widths = [192, 256, 448, 512, 832, 960]
        self.chains = nn.ModuleList(
            nn.Sequential(nn.Linear(64, w), nn.Tanh(), nn.Linear(w, 2 * w), nn.Tanh(), nn.Linear(2 * w, 16))
            for w in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([chain(x) for chain in self.chains]).sum(0)


def steps(model: nn.Module, count: int = 12) -> list[float]:
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        model.zero_grad()
        loss = model(torch.randn(1536, 64, device="cuda")).square().mean()
        loss.backward()
        found.append(loss.item())
    return found


def segments(graph: Captured) -> Sequence[dict[str, Any]]:
    """Those of the memory that its recordings have."""
    pools = [body._forward.pool for body in graph._bodies]
    return [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) in pools]


def test_less_memory_for_the_same(daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Branches().cuda()
    wanted = steps(plain)
    found = {}
    for is_known in (False, True):
        torch._dynamo.reset()
        model = on_captured(copy.deepcopy(plain))
        with monkeypatch.context() as patch:
            if not is_known:
                patch.setattr(Packing, "is_known", False)
            assert steps(model) == pytest.approx(wanted, rel=1e-5)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert made[-1].thrift.frees
        assert made[-1]._bodies[0].is_packed == is_known
        found[is_known] = segments(made[-1])
    sizes = made[-1]._bodies[0].packing._sizes
    large = [
        (s["stream"], s["total_size"]) for s in found[True] if s["segment_type"] == "large" and s["stream"] in sizes
    ]
    assert sorted(large) == sorted(sizes.items()), "one for each stream that gains by it"
    assert len({segment["stream"] for segment in found[True]}) >= 7
    totals = {is_known: sum(segment["total_size"] for segment in those) for is_known, those in found.items()}
    assert totals[True] < totals[False], totals
    assert not torch._C._cuda_isHistoryEnabled()


def test_it_is_given_back(daemon: None, made: list[Captured]) -> None:
    model = on_captured(Branches().cuda())
    steps(model)
    assert made[0]._bodies[0].is_packed
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes = torch.cuda.mem_get_info()[0]
    size = sum(segment["total_size"] for segment in segments(made[0]))
    model.zero_grad()
    made[0]._bodies.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] - free_bytes >= size
    assert steps(model)[-1] > 0


@pytest.fixture
def history() -> Iterator[None]:
    """The script records what the allocator does."""
    torch.cuda.memory._record_memory_history(stacks="python")
    yield
    torch.cuda.memory._record_memory_history(None)


def test_a_history_of_the_script_stays(daemon: None, made: list[Captured], history: None) -> None:
    steps(on_captured(Branches().cuda()))
    assert torch._C._cuda_isHistoryEnabled()
    assert made[0].thrift.frees
    assert not made[0]._bodies[0].is_packed


def kernels(model: nn.Module) -> int:
    """How many a step has, memory that is set included."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps(model, 1)
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == DeviceType.CUDA)


def test_deterministic_algorithms_do_not_fill_it(
    daemon: None, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch would write into memory that is asked for would be written in each replay."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    plain = Branches().cuda()
    counts = {}
    torch.use_deterministic_algorithms(True)
    try:
        wanted = steps(plain)
        for is_known in (False, True):
            torch._dynamo.reset()
            model = on_captured(copy.deepcopy(plain))
            with monkeypatch.context() as patch:
                if not is_known:
                    patch.setattr(Packing, "is_known", False)
                assert steps(model) == pytest.approx(wanted, rel=1e-5)
                counts[is_known] = kernels(model)
            assert made[-1]._bodies[0].is_packed == is_known
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < counts[True] == counts[False]
