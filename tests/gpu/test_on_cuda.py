"""Lanes under CUDA MPS: same results as plain PyTorch, whatever is slow, and processes that really are clients."""

import copy
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from networks import SMALL, GoogLeNet, Three, images, why_not_here
from test_branches import SETS, Loop
from torch import Tensor, nn
from transparency import assert_same, assert_transparent, on_lanes

import mpsrun
from mpsrun.mps.verify import Attachment, verify
from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.gpu
LONG = 100_000_000  # cycles of the GPU: some 50 ms
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def test_all_processes_are_clients(on_gpu: Coordinator) -> None:
    torch.zeros(1, device="cuda")
    pids = [os.getpid(), *(link.pid for link in on_gpu.links if link.pid is not None)]
    assert verify(pids) == Attachment("CUDA MPS")


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(on_gpu: Coordinator, name: str) -> None:
    """The same list as on the CPU; random ops may leave the lead here, and draw the same numbers."""
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = SMALL[name]
    used = None if name == "dropout" else case.used
    options = {"used": used, "forward_only": case.forward_only, "device": "cuda"}
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_transparent(case.model, case.inputs, 3, case.regions, **options)  # type: ignore[arg-type]


def test_single_precision(on_gpu: Coordinator) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    options = {"device": "cuda", "dtype": torch.float32, "tolerance": tolerance}
    assert_transparent(GoogLeNet, lambda: images(size=16), 3, (4,) * 9, **options)  # type: ignore[arg-type]


class Slow(nn.Module):
    """Three branches, of which one computes for long."""

    def __init__(self, slow: int) -> None:
        super().__init__()
        self.slow = slow
        self.weight = nn.Parameter(torch.randn(1024, 1024) / 32)
        self.paths = nn.ModuleList(nn.Linear(1024, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for index, path in enumerate(self.paths):
            hidden = x * (index + 1)
            if index == self.slow:
                for _ in range(40):
                    hidden = torch.tanh(hidden @ self.weight)
            outputs.append(path(hidden))
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_branch_is_waited_for(on_gpu: Coordinator, slow: int) -> None:
    """Forward and backward of one branch take long: the lead must not read before they are done."""
    make: Callable[[], nn.Module] = lambda: Slow(slow)  # noqa: E731
    assert_transparent(make, lambda: (torch.randn(256, 1024),), 3, (3,), device="cuda")


class Delayed(nn.Module):
    """A network around which the GPU is made to sleep: before its input, after its output, in its backward."""

    def __init__(self, model: nn.Module, before: bool, after: bool, backward: bool) -> None:
        super().__init__()
        self.model, self.before, self.after, self.backward = model, before, after, backward

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            torch.cuda._sleep(LONG)
        y = self.model(x * 2)
        if self.after:
            torch.cuda._sleep(LONG)
        y = y * 3
        if self.backward:
            y.register_hook(lambda gradient: (torch.cuda._sleep(LONG), gradient * 2)[1])
        return y


@pytest.mark.parametrize("where", ["before", "after", "backward"])
def test_planted_sleep(on_gpu: Coordinator, where: str) -> None:
    """A hand-off that is not ordered on the GPU would read what is not there yet."""
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_lanes(copy.deepcopy(plain), 3)
    wrapped = [Delayed(m, *(where == w for w in ("before", "after", "backward"))) for m in (plain, fast)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.02) for m in wrapped]
    for step in range(6):
        x = torch.randn(5, 6, device="cuda", dtype=torch.float64)
        seen = []
        for model, optimizer in zip(wrapped, optimizers, strict=True):
            given = x.clone().requires_grad_()
            optimizer.zero_grad()
            output = model(given)
            output.square().sum().backward()
            optimizer.step()
            state = {name.removeprefix("model."): v.clone() for name, v in model.state_dict().items()}
            seen.append({"output": output.detach(), "gradient": given.grad, **state})
        assert_same(seen[1], seen[0], f"step {step}", EXACT)


def test_side_streams(on_gpu: Coordinator) -> None:
    """Steps from changing streams of the script are in order in the workers, too."""
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_lanes(copy.deepcopy(plain), 3)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(12):
        x = torch.randn(5, 6, device="cuda", dtype=torch.float64)
        stream = streams[step % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 10)
            fast.zero_grad()
            found = fast(x)
            found.square().sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        plain.zero_grad()
        wanted = plain(x)
        wanted.square().sum().backward()
        torch.testing.assert_close(found, wanted, **EXACT)
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, **EXACT, msg=name)


def test_backward_comes_in_the_calling_thread(on_gpu: Coordinator) -> None:
    """Also for what the script does around the network; a thread that calls no network has autograd's own."""
    torch.autograd.set_multithreading_enabled(True)
    fast = on_lanes(Three(64).to("cuda"), 3)
    seen: set[int] = set()

    def backward(x: Tensor) -> int:
        x.register_hook(lambda _: seen.add(threading.get_ident()))
        x.square().sum().backward()
        return threading.get_ident()

    for _ in range(3):
        here = backward(fast(torch.randn(5, 6, device="cuda")))
    assert seen == {here}
    seen.clear()
    with ThreadPoolExecutor(1) as threads:
        there = threads.submit(backward, torch.ones(3, device="cuda", requires_grad=True)).result()
    assert seen
    assert there not in seen


def test_memory_is_flat(on_gpu: Coordinator) -> None:
    """Slots and worker activations are used again, also where a backward never comes."""
    fast = on_lanes(Three(64).to("cuda"), 3)
    x = torch.randn(5, 6, device="cuda")

    def steps(count: int) -> int:
        for step in range(count):
            loss = fast(x).square().sum()
            if step % 3:
                loss.backward()
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    free = steps(60)
    assert steps(300) >= free - (8 << 20)


@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_sets_of_branches(on_gpu: Coordinator, chance: float) -> None:
    """Branches chosen per call, in any order, draw what they draw one after the other."""
    torch.manual_seed(0)
    branches = [
        nn.Sequential(nn.Linear(6, 8 + i), nn.Dropout(chance if i % 2 else 0.0), nn.Linear(8 + i, 6)) for i in range(5)
    ]
    branches = [branch.to("cuda", torch.float64) for branch in branches]
    plain, fast = Loop(copy.deepcopy(branches), "cat"), mpsrun.Branches(branches, "cat")
    for step, active in enumerate([range(5), range(5), *SETS]):
        x = torch.randn(4, 6, dtype=torch.float64, device="cuda")
        wanted, found = (seen(model, x, active, step) for model in (plain, fast))
        assert_same(found, wanted, f"{step}: {active}", EXACT)
    assert sum(sum(counts.backwards.values()) for counts in on_gpu.counts().values()) >= len(SETS)


def seen(model: nn.Module, x: Tensor, active: Sequence[int], seed: int) -> dict[str, Any]:
    """Output, gradients, and where the generator stands afterwards."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(x, active=active)
    output.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"output": output.detach(), "random state": torch.cuda.get_rng_state(), **gradients}
