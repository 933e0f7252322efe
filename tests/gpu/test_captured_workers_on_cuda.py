"""Captured worker lanes on a GPU: graphs of several processes that order each other by captured memory operations."""

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from captures import habits, noted, on_captured_workers
from networks import SMALL, GoogLeNet, Three, images
from torch import Tensor, nn
from transparency import assert_executed, assert_same, moved, trained

from mpsrun.run import report
from mpsrun.run.captured import Captured
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.relay import Relay
from mpsrun.wire import messages as m

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}
LONG = 40_000_000  # cycles of the GPU: some 20 ms
NAMES = ["inception", "pathnet", "towers", "heads", "googlenet", "nested forks", "shared parameter", "several tensors"]
Fault = Callable[[Coordinator, int, pytest.MonkeyPatch], None]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Captured]]:
    """All captured graphs of a test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    report.graphs.clear()
    found = noted(monkeypatch)
    yield found
    found.clear()


@pytest.mark.parametrize("name", NAMES)
def test_small_networks(on_gpu: Coordinator, made: list[Captured], name: str) -> None:
    case = SMALL[name]
    torch.manual_seed(0)
    plain = trained(case.model().to("cuda", torch.float64))
    fast = trained(on_captured_workers(copy.deepcopy(plain.model), 3))
    for step in range(8):
        given = tuple(moved(x, "cuda", torch.float64) for x in case.inputs())
        assert_same(fast.step(given, step), plain.step(given, step), f"step {step}", EXACT)
    assert [graph.replays for graph in made] == [6]
    if not case.forward_only:
        (graph,) = report.graphs
        assert_executed(graph, 7, 7)


def losses(model: nn.Module, steps: int, autocast: torch.dtype | None = None) -> list[float]:
    """A loop that keeps its last loss, as most do, and reads it at the end only: the GPU is always behind."""
    torch.manual_seed(0)
    generator = torch.Generator("cuda").manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dtype = next(model.parameters()).dtype
    found = []
    for _ in range(steps):
        x = torch.randn(16, 6, device="cuda", generator=generator, dtype=dtype)
        optimizer.zero_grad()
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def test_loss_curve_of_200_steps(on_gpu: Coordinator, made: list[Captured]) -> None:
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_captured_workers(copy.deepcopy(plain), 2)
    assert losses(fast, 200) == pytest.approx(losses(plain, 200), rel=1e-9)
    assert made[0].replays == 198


def test_autocast(on_gpu: Coordinator, made: list[Captured]) -> None:
    torch.manual_seed(0)
    plain = Three(64).to("cuda")
    fast = on_captured_workers(copy.deepcopy(plain), 2)
    assert losses(fast, 20, torch.bfloat16) == pytest.approx(losses(plain, 20, torch.bfloat16), rel=1e-3)
    assert made[0].replays == 18


def test_two_networks_of_several_regions_take_turns(on_gpu: Coordinator, made: list[Captured]) -> None:
    """Their relays share counters."""
    torch.manual_seed(0)
    plain = [trained(GoogLeNet().to("cuda", torch.float64)) for _ in range(2)]
    fast = [trained(on_captured_workers(copy.deepcopy(one.model), 3)) for one in plain]
    for step in range(6):
        given = tuple(moved(x, "cuda", torch.float64) for x in images())
        for i in range(2):
            assert_same(fast[i].step(given, step), plain[i].step(given, step), f"step {step} of {i}", EXACT)


@pytest.fixture(params=["released late", "waits late", "replayed late"])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep on the GPU in one place of every step of a relay, inside of the lead's graph, or in front of it."""
    owner, name = {
        "released late": (Relay, "release"),
        "waits late": (Relay, "wait"),
        "replayed late": (Coordinator, "replay"),
    }[request.param]
    real = getattr(owner, name)

    def late(*args: object) -> object:
        torch.cuda._sleep(LONG)
        return real(*args)

    monkeypatch.setattr(owner, name, late)


def test_under_a_delay(on_gpu: Coordinator, made: list[Captured], delay: None) -> None:
    torch.manual_seed(0)
    plain = Three(64).to("cuda", torch.float64)
    fast = on_captured_workers(copy.deepcopy(plain), 2)
    assert losses(fast, 12) == pytest.approx(losses(plain, 12), rel=1e-9)
    assert made[0].replays == 10


class Slow(nn.Module):
    """Three branches, of which two compute for long: in workers, wherever the lead keeps one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1024, 1024) / 32)
        self.first = nn.Linear(6, 1024)
        self.paths = nn.ModuleList(nn.Linear(1024, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for index, path in enumerate(self.paths):
            hidden = self.first(x) * (index + 1)
            for _ in range(20 if index else 1):
                hidden = torch.tanh(hidden @ self.weight)
            outputs.append(path(hidden))
        return torch.cat(outputs, 1)


def test_a_slow_worker_is_waited_for(on_gpu: Coordinator, made: list[Captured]) -> None:
    torch.manual_seed(0)
    plain = Slow().to("cuda", torch.float64)
    fast = on_captured_workers(copy.deepcopy(plain), 3)
    assert losses(fast, 8) == pytest.approx(losses(plain, 8), rel=1e-9)
    assert made[0].replays == 6


def test_habits(on_gpu: Coordinator, made: list[Captured]) -> None:
    """Two forwards before a backward, kept graphs, evaluation, another stream, moved weights."""
    torch.manual_seed(0)
    plain = Three(16).to("cuda", torch.float64)
    fast = on_captured_workers(copy.deepcopy(plain), 2)
    generator = torch.Generator("cuda").manual_seed(2)
    for turn in range(5):
        batches = [torch.randn(5, 6, device="cuda", dtype=torch.float64, generator=generator) for _ in range(3)]
        found, wanted = (habits(model, batches, turn) for model in (fast, plain))
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b, msg=lambda text, at=(turn, i): f"{at}: {text}", **EXACT)
    assert sum(graph.replays for graph in made) >= 8


def test_memory_stays_flat(on_gpu: Coordinator, made: list[Captured]) -> None:
    fast = on_captured_workers(Three(64).to("cuda"), 2)
    losses(fast, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses(fast, 200)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 1024


def killed(coordinator: Coordinator, pid: int, _: pytest.MonkeyPatch) -> None:
    """Die with a message unread: nothing of the victim runs on the GPU."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()


def stuck(coordinator: Coordinator, pid: int, _: pytest.MonkeyPatch) -> None:
    """Do nothing from now on; the watchdog has to notice."""
    os.kill(pid, signal.SIGSTOP)


def raising(coordinator: Coordinator, pid: int, patch: pytest.MonkeyPatch) -> None:
    """Be told to replay what was never recorded."""
    send_step = coordinator._channel.send_step
    victim = next(link.index for link in coordinator.links if link.pid == pid)

    def send_wrong(worker: int, message: m.ToWorker) -> None:
        wrong = worker == victim and isinstance(message, m.Replay)
        send_step(worker, msgspec.structs.replace(message, relay=10**9) if wrong else message)

    patch.setattr(coordinator._channel, "send_step", send_wrong)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fault", [raising, killed, stuck])
def test_the_run_goes_on(expendable: Coordinator, made: list[Captured], fault: Fault, where: str) -> None:
    patch = pytest.MonkeyPatch()
    torch.manual_seed(0)
    plain = Three().to("cuda", torch.float64)
    fast = on_captured_workers(copy.deepcopy(plain), 1)
    victim = expendable.usable()[0]
    pid = expendable.links[victim - 1].pid
    assert pid is not None
    for step in range(8):
        x = torch.randn(5, 6, device="cuda", dtype=torch.float64)
        seen = []
        for model in (plain, fast):
            hurt = model is fast and step == 5
            if hurt and where == "forward":
                fault(expendable, pid, patch)
            model.zero_grad()
            output = model(x)
            if hurt and where == "backward":
                torch.cuda.synchronize()
                fault(expendable, pid, patch)
            output.square().sum().backward()
            torch.cuda.synchronize()
            patch.undo()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            seen.append({"output": output.detach(), **gradients, **model.state_dict()})
        assert_same(seen[1], seen[0], f"step {step}", EXACT)
    assert made[0].replays >= 3, "the fault met a replay"
    assert victim not in expendable.usable()
    assert expendable.usable(), "only the victim is out"
