"""What the benchmark measures on a GPU: handwork that computes the same, memory of one engine alone, kernels by run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bound, by_hand, memory
from benchmarks.cases import TRIAL, Case
from benchmarks.engines import ENGINES
from examples.networks import GoogLeNet, PathNet, Towers, TwoTowers
from mpsrun.run import demand

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("daemon")]

LONG = 20_000_000  # cycles of the GPU: some 10 ms
TRIAL_CASE = Case("trial", 4, TRIAL["trial"])
IMAGES = (4, 3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "googlenet": (lambda: GoogLeNet(10, 0.25, stem_stride=1), lambda: (torch.randn(IMAGES),)),
    "towers": (lambda: Towers(4, 64, 2), lambda: (torch.randn(2, 16, 64),)),
    "pathnet": (lambda: PathNet(3, 4, 16), lambda: (torch.randn(IMAGES),)),
    "two-towers": (lambda: TwoTowers(32, 50, 16), lambda: (torch.randn(IMAGES), torch.randint(50, (4, 16)))),
}


def squares(outputs: Any) -> Tensor:
    return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("late", [False, True], ids=["as it is", "slow sides"])
@pytest.mark.parametrize("name", NETWORKS)
def test_branches_by_hand_in_a_graph(name: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    make, make_inputs = NETWORKS[name]
    plain = make().to("cuda", torch.float64)
    other = copy.deepcopy(plain)
    inputs = [x.to("cuda", torch.float64 if x.is_floating_point() else x.dtype) for x in make_inputs()]
    beside = by_hand.beside

    def slow(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*values: Tensor) -> Tensor:
            torch.cuda._sleep(LONG)
            return function(*values)

        return run

    if late:
        monkeypatch.setattr(
            by_hand, "beside", lambda *branches, first=0: beside(*((slow(f), *x) for f, *x in branches), first=first)
        )
    graphed = ENGINES["streams in graph"](other, inputs, False)
    other.load_state_dict(plain.state_dict())  # capturing has moved the statistics of BatchNorm
    for _ in range(3):
        for model, call in ((plain, plain), (other, graphed)):
            model.zero_grad(set_to_none=True)
            squares(call(*inputs)).backward()
        for ours, theirs in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-9, atol=1e-11)


class Waits(nn.Module):
    """Waits for the GPU in its forward, which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * float(x.sum())


def test_after_a_capture_that_fails_the_next_one_works() -> None:
    x = torch.randn(4, 8, device="cuda")
    with pytest.raises(RuntimeError):
        ENGINES["cuda graph"](Waits().cuda(), [x], False)
    torch.rand(4, device="cuda")
    call = ENGINES["cuda graph"](nn.Linear(8, 8).cuda(), [x], False)
    call(x).sum().backward()
    torch.cuda.synchronize()


def test_memory_of_others_is_not_counted() -> None:
    mib = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    others = mib.repeat(200)
    source = memory.allocator()
    assert source is not None
    meter = memory.Meter(source)
    own = mib.repeat(100)
    found = meter.measure(lambda: mib.repeat(300), False)
    assert 400 <= found["allocated MiB"] < 410
    assert 400 <= found["reserved MiB"] < 450
    assert len(others) == 2 * len(own)


def test_kernels_belong_to_their_runs() -> None:
    torch.cuda.synchronize()
    short, long = torch.ones(1000, device="cuda"), torch.ones(50_000_000, device="cuda")
    runs = [short.sin, lambda: (long.sin(), long.sin()), lambda: None]
    first, second, nothing = demand.measure(runs) or []
    assert 0 < first.kernel_us < second.kernel_us / 10
    assert first.share is not None
    assert first.share < 0.1
    assert second.full_us == pytest.approx(second.kernel_us, rel=0.1)  # the last wave of blocks may be a smaller one
    assert nothing.kernel_us == 0


def test_the_bound_of_a_network() -> None:
    found = bound.measure(TRIAL_CASE, TRIAL_CASE.of.make())
    assert 0 < found["full GPU ms"] < found["critical path ms"] < found["one after the other ms"]
    assert found["ms"] == found["critical path ms"]
