"""Captured plans whose convolutions have the channels last: what has them, and that nobody can tell."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from captures import assert_transparent, noted, on_captured
from images import BODIES, OF_THREE, Body, Fork, Programme, ask_for_channels_last, assert_same_as_plain
from networks import Three
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from mpsrun.config import Config
from mpsrun.graph import channels_last, ops
from mpsrun.graph.channels_last import FLOATING, REDUCED, what_may
from mpsrun.graph.effects import analyze
from mpsrun.graph.regions import find_regions
from mpsrun.run import cotuning, lower, memory_format, report, special
from mpsrun.run.captured import Captured
from mpsrun.run.options import Options

LAST, USUAL = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All captured graphs of a test, with the channels last."""
    ask_for_channels_last(monkeypatch)
    return noted(monkeypatch)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[torch.memory_format]:
    """Which tensors were put into another order, in the order of the program."""
    found: list[torch.memory_format] = []
    turn = memory_format._Turned.apply

    def apply(value: Tensor, wanted: torch.memory_format | None) -> Tensor:
        found.extend([] if wanted is None else [wanted])
        return turn(value, wanted)

    monkeypatch.setattr(memory_format._Turned, "apply", apply)
    return found


def graph_of(model: nn.Module, *given: Tensor) -> fx.GraphModule:
    """What Dynamo makes of a network."""
    found: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch.compile(model, backend=note)(*given)
    return found[0]


def last_in(model: nn.Module, *given: Tensor, dtypes: frozenset[torch.dtype] = FLOATING) -> list[str] | None:
    """The ops whose results have the channels last; None where nothing may."""
    gm = graph_of(model, *given)
    found = what_may(gm, analyze(gm), dtypes)
    if found is None:
        return None
    names = {node: ops.name_of(node.op, node.target, node.args) for node in gm.graph.nodes if node in found.values}
    return [name.rsplit(".", 1)[-1] for name in names.values() if name is not None]


class Plain(nn.Module):
    """A chain of what `body` does with a convolution."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv, self.other, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@pytest.mark.parametrize("name", ["inception", "googlenet", "channels last"])
def test_small_networks(made: list[Captured], name: str, turned: list[torch.memory_format]) -> None:
    assert_transparent(name, on_captured, made)
    assert (LAST in turned) == (name != "channels last"), "which has them by itself"


@pytest.mark.parametrize(
    ("name", "kernel"), [(name, k) for name in BODIES for k in (1, 3) if k == 3 or name not in OF_THREE]
)
def test_nobody_can_tell(name: str, kernel: int, made: list[Captured], turned: list[torch.memory_format]) -> None:
    assert_same_as_plain(lambda: Fork(BODIES[name], kernel=kernel), made)
    assert LAST in turned


def test_what_is_written_in_place_is_no_copy(made: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if an op had not kept the order."""
    turn = lower.in_format

    def in_a_copy(value: Any, wanted: torch.memory_format) -> Any:
        return turn(value.clone() if isinstance(value, Tensor) else value, wanted)

    monkeypatch.setattr(lower, "in_format", in_a_copy)
    assert_same_as_plain(lambda: Fork(BODIES["added to what is read"]), made)


@pytest.mark.parametrize("drop", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_random_masks_are_those_of_plain_pytorch(drop: Callable[[Tensor], Tensor], made: list[Captured]) -> None:
    """They are drawn in the order of memory."""
    assert_same_as_plain(lambda: Fork(BODIES["convolutions"], end=drop), made)


@pytest.mark.parametrize("seed", range(24))
def test_programmes_drawn_by_chance(seed: int, made: list[Captured]) -> None:
    assert_same_as_plain(lambda: Programme(seed), made, steps=3)


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": F.dropout,
    "rows": lambda y: y.permute(0, 2, 3, 1).reshape(2, -1),
    "view": lambda y: y.permute(0, 2, 3, 1).view(2, -1),
    "strides": lambda y: y.as_strided((2, 4), y.stride()[:2]),
    "itself": lambda y: y,
    "one pixel": lambda y: F.adaptive_avg_pool2d(y, 1),
}


class NarrowThenWide(nn.Module):
    """Images of one channel have both orders at once, and so have those of one pixel."""

    def __init__(self, end: Callable[[Tensor], Tensor], pixels: int) -> None:
        super().__init__()
        self.end, self.pixels = end, pixels
        self.left, self.right = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)
        self.wide, self.other = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.pixels == 1:
            x = F.adaptive_avg_pool2d(x, 1)
        left, right = self.left(x), self.right(x)
        return left * 0.01, right * 0.01, self.end(self.wide(left) + self.other(right)) * 0.01


@pytest.mark.parametrize("memory_format", [LAST, USUAL])
@pytest.mark.parametrize("pixels", [1, 36])
@pytest.mark.parametrize("end", ENDS)
def test_images_of_one_channel_or_pixel(
    end: str, pixels: int, memory_format: torch.memory_format, made: list[Captured]
) -> None:
    """Whatever order a script has itself."""
    if end == "view" and memory_format is USUAL and pixels > 1:
        pytest.skip("not in plain PyTorch either")
    make = lambda: NarrowThenWide(ENDS[end], pixels)  # noqa: E731
    assert_same_as_plain(make, made, memory_format=memory_format)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_batch_of_gradients(kernel: int, made: list[Captured]) -> None:
    """Which has a vmap of its own."""
    torch.manual_seed(0)
    plain = Fork(BODIES["residual"], kernel).double()
    fast = on_captured(copy.deepcopy(plain))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        found = []
        for model in (plain, fast):
            y = model(x)
            batch = torch.arange(3.0, dtype=torch.float64).view(3, 1, 1, 1, 1).expand(3, *y.shape)
            wanted = (x, *model.parameters())
            found.append(torch.autograd.grad(y, wanted, batch, is_grads_batched=True))
        torch.testing.assert_close(found[1], found[0])
    assert made


def test_several_readers_share_a_copy(made: list[Captured], turned: list[torch.memory_format]) -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = x.exp()
        return sum((net.convolutions[i % 2](y) for i in range(5)), y).cumsum(1) * y.cumsum(2)

    assert_same_as_plain(lambda: Fork(body), made, steps=3)
    calls, branches = 2, 2
    # x, the stem's weight; on each branch y, two weights
    assert turned.count(LAST) == calls * (2 + branches * 3)


def write_half(net: Any, x: Tensor) -> Tensor:
    y = net.other(net.conv(x))
    y[:, 0] = 0
    return y


def write_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    rows = y.flatten(1)
    rows.mul_(2)
    return net.other(y)


def look_at_what_is_written(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    rows = y.flatten(1)
    y.relu_()
    return net.other(y).flatten(1) + rows


@pytest.mark.parametrize(
    ("body", "left"),
    [(write_half, ["conv2d"]), (write_a_view, ["conv2d"]), (look_at_what_is_written, ["conv2d"])],
)
def test_an_op_that_would_write_a_copy(body: Body, left: list[str]) -> None:
    """Whoever shares the memory would not see it: it keeps its order, and the other convolution's result does not."""
    assert last_in(Plain(body), torch.randn(2, 3, 5, 5)) == left
    assert last_in(Plain(lambda net, x: body(net, x).sum()), torch.randn(2, 3, 5, 5)) == left


def test_what_has_its_channels_last() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.conv(x.exp()))
        return F.softmax(net.other(y) + y, 1) + F.dropout(y)

    assert last_in(Plain(body), torch.randn(2, 3, 5, 5)) == ["conv2d", "relu", "conv2d", "add"]


def test_only_where_tensor_cores_are_used() -> None:
    model, given = Plain(lambda net, x: net.conv(x)), torch.randn(2, 3, 5, 5)
    assert last_in(model, given, dtypes=REDUCED) is None
    assert last_in(model.bfloat16(), given.bfloat16(), dtypes=REDUCED) == ["conv2d"]


def test_a_script_that_has_its_channels_last_already() -> None:
    model = Plain(lambda net, x: net.other(F.relu(net.conv(x)))).to(memory_format=LAST)  # type: ignore[call-overload]
    assert last_in(model, torch.randn(2, 3, 5, 5).to(memory_format=LAST)) is None


def test_without_images() -> None:
    assert last_in(Plain(lambda _, x: x.sin()), torch.randn(2, 3, 5, 5)) is None
    assert last_in(nn.Linear(3, 3), torch.randn(2, 3)) is None


def test_tensors_without_strides() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 5, 5), torch.randn(3, 4, 5)])
    for value in (torch.randn(2, 3, 5, 5).to_sparse(), nested, None, 7):
        assert not channels_last._is_plain_images(value)


def test_sizes_that_change_get_no_guard() -> None:
    """What is asked about fake sizes is not the script's business."""
    model = Plain(lambda net, x: torch.cat([F.relu(net.conv(x.sin())), x, x.transpose(2, 3)], 1))
    guards: list[tuple[int, int]] = []

    def note(gm: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        effects = analyze(gm)
        (mode,) = {value.fake_mode for value in effects.values.values() if isinstance(value, FakeTensor)}
        before = len(mode.shape_env.guards)
        assert what_may(gm, effects, FLOATING) is not None
        guards.append((before, len(mode.shape_env.guards)))
        return gm.forward

    compiled = torch.compile(model, backend=note, dynamic=True)
    for size in (5, 6, 9):
        compiled(torch.randn(size, 12, size + 1, size)[:, ::4, 1:])
    ((before, after),) = guards
    assert before == after > 0


def test_every_op_has_a_name_that_is_known() -> None:
    for name in channels_last.CONVOLUTIONS | channels_last.KEEPS | channels_last.MEETS | channels_last.JOINS:
        target = ops.resolve(name)
        assert target is not None
        if not name.startswith("Tensor."):
            assert ops.name_of("call_function", target) == name


# ---- putting into another order


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5), (1, 3, 4, 1), (0, 3, 4, 5)])
@pytest.mark.parametrize("wanted", [LAST, USUAL])
@pytest.mark.parametrize("before", [LAST, USUAL, None])
def test_orders(shape: tuple[int, ...], wanted: torch.memory_format, before: torch.memory_format | None) -> None:
    """Values stay, the order is the wanted one; gradients are in the order that the tensor had, if it has no gaps."""
    base = torch.randn(*shape[:3], shape[3] * 2, dtype=torch.float64)
    value = base[..., ::2] if before is None else torch.randn(shape).to(base, memory_format=before)
    given = value.detach().requires_grad_() if before is not None else base.requires_grad_()[..., ::2]
    result = memory_format.in_format(given, wanted)
    torch.testing.assert_close(result, given)
    assert result.is_contiguous(memory_format=wanted)
    if wanted is USUAL:
        assert result.stride() == torch.empty(shape).stride()
    (found,) = torch.autograd.grad(result, given, torch.randn(shape, dtype=torch.float64).to(memory_format=LAST))
    if before is not None and (result is not given or wanted is LAST):
        assert found.stride() == given.stride()


def test_gradients_of_gradients() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor, w: Tensor) -> Tensor:
        images, weight = memory_format.in_format(x, LAST), memory_format.in_format(w, LAST)
        return memory_format.in_format(F.conv2d(images, weight).tanh(), USUAL)

    assert torch.autograd.gradcheck(both, (x, w))
    assert torch.autograd.gradgradcheck(both, (x, w))


def test_what_is_no_tensor_of_images_stays() -> None:
    rows = torch.randn(3, 4)
    assert memory_format.in_format(rows, LAST) is rows
    assert memory_format.in_format(7, USUAL) == 7


# ---- who gets it


def planner_of(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> special.Planner:
    """For a graph with a convolution of float32 on a GPU, under these settings."""
    monkeypatch.setattr(special.config, "current", lambda: Config(**settings))
    gm = graph_of(Plain(lambda net, x: net.conv(x)), torch.randn(2, 3, 5, 5))
    planner = object.__new__(special.Planner)
    planner._gm, planner._effects, planner._kind, planner._formats = gm, analyze(gm), "cuda", {}
    return planner


def test_who_may_have_the_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    assert planner_of(monkeypatch).turns
    assert not planner_of(monkeypatch, channels_last="off").turns
    planner = planner_of(monkeypatch)
    for name, value in (("allow_tf32", False), ("deterministic", True), ("enabled", False)):
        with monkeypatch.context() as patch:
            patch.setattr(cudnn, name, value)
            assert not planner.turns, name
        assert planner.turns
    on_cpu = planner_of(monkeypatch)
    on_cpu._kind = "cpu"
    assert not on_cpu.turns


@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_which_captured_plans_have_the_channels_last(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special.config, "current", lambda: Config(channels_last=asked, worker_share=50))  # type: ignore[arg-type]
    gm = graph_of(Fork(BODIES["convolutions"]), torch.randn(2, 3, 6, 6))
    effects = analyze(gm)
    regions = find_regions(gm, effects).regions
    planner = special.Planner(gm, effects, regions, "cuda", Options("auto", None), report.Graph())
    planner.subject.refusal = None  # its tensors are on the CPU
    plans = [candidate.plan for candidate in planner.candidates([])]
    assert len({str(plan) for plan in plans}) == len(plans)
    captured = [plan.channels_last for plan in plans if plan.captured]
    assert (
        sorted(captured)
        == {
            "auto": [False, False, False, True, True],  # as it is, on streams, and that with gradients beside
            "on": [True, True, True],
            "off": [False, False, False],
        }[asked]
    )
    assert not any(plan.channels_last for plan in plans if not plan.captured)


@pytest.mark.parametrize("timed", [False, True])
def test_algorithms_are_those_that_cudnn_recommends(
    timed: bool, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To time all of them once more would take too long: the graph meets its convolutions once without."""
    seen: list[bool] = []
    turn = lower.in_format

    def noted_turn(value: Any, wanted: torch.memory_format) -> Any:
        seen.append(torch.backends.cudnn.benchmark)
        return turn(value, wanted)

    monkeypatch.setattr(lower, "in_format", noted_turn)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", timed)
    assert_same_as_plain(lambda: Fork(BODIES["convolutions"]), made)
    assert torch.backends.cudnn.benchmark is timed
    first = seen.index(timed)
    assert (first > 0) is timed
    assert set(seen[first:]) == {timed}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), ValueError("planted")])
def test_convolutions_that_cannot_be_met_in_advance(
    error: Exception, made: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_args: object) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    monkeypatch.setattr(cotuning, "whole", failing)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert_same_as_plain(lambda: Fork(BODIES["flat"]), made)


def test_a_note_where_nothing_may(made: list[Captured]) -> None:
    model = on_captured(Three(8).double())
    for _ in range(3):
        model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    (graph,) = report.graphs
    assert [text for text in graph.refusals if "channels last" in text]
    assert [graph.replays for graph in made] == [1]
