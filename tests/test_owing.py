"""Parameters that are in no graph get what plain PyTorch gives them, and who asks for their gradients gets these."""

import copy
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from captures import Pair, inputs, on_captured, step, three
from networks import Three
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from transparency import TOLERANCE

from mpsrun.checkout import with_package
from mpsrun.run import owing, report

Use = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    report.graphs.clear()


def owes(output: Tensor) -> bool:
    """Whether a call has a token in its graph instead of its parameters."""
    assert output.grad_fn is not None
    return len(output.grad_fn.next_functions) == 1


@pytest.fixture
def pair() -> Pair:
    made = Pair(on_captured, three, calls=3)
    outputs = [model(inputs()) for model in (made.plain, made.fast)]  # both, for their statistics
    assert owes(outputs[1])
    return made


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [*model.parameters()]


def all_asked(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    return torch.autograd.grad(model(inputs()).square().sum(), weights(model))


def some_asked(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    x, stranger = inputs().requires_grad_(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    return [*torch.autograd.grad(model(x).sum(), [weights(model)[2], x, stranger], allow_unused=True)]


def only_others_asked(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    x = inputs().requires_grad_()
    return torch.autograd.grad(model(x).sum(), [x])


def some_accumulate(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    x = inputs().requires_grad_()
    for _ in range(2):
        model(x).square().sum().backward(inputs=[x, weights(model)[1], weights(model)[-1]])
    return [x.grad]


def edges_asked(model: nn.Module) -> Sequence[Tensor]:
    loss = model(inputs()).square().sum()
    return torch.autograd.grad(loss, [get_gradient_edge(weights(model)[0]), weights(model)[3]])


def two_batches(model: nn.Module) -> None:
    model.zero_grad()
    for seed in range(2):
        model(inputs(seed)).square().sum().backward()


def zeroed_in_place(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)
    model(inputs()).square().sum().backward()


def kept_graph(model: nn.Module) -> None:
    model.zero_grad()
    loss = model(inputs()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def kept_and_asked(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    loss = model(inputs()).square().sum()
    found = torch.autograd.grad(loss, weights(model), retain_graph=True)
    loss.backward()
    return found


def used_twice(model: nn.Module) -> Tensor:
    """In the network, and in a penalty beside it."""
    model.zero_grad()
    loss = model(inputs()).square().sum() + sum(p.square().sum() for p in weights(model))
    loss.backward(retain_graph=True)
    return torch.autograd.grad(loss, weights(model)[0])[0]


def differentiated_twice(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    first = torch.autograd.grad(model(inputs()).square().sum(), weights(model), create_graph=True)
    sum(slope.square().sum() for slope in first).backward()  # type: ignore[union-attr]
    return [slope.detach() for slope in first]


def with_a_graph(model: nn.Module) -> Tensor:
    """Gradients that have a graph themselves."""
    model.zero_grad()
    model(inputs()).square().sum().backward(create_graph=True)
    slopes = [p.grad for p in weights(model)]
    model.zero_grad()
    sum(slope.square().sum() for slope in slopes).backward()  # type: ignore[union-attr]
    return torch.stack([slope.detach().sum() for slope in slopes if slope is not None])


def batched(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    output = model(inputs())
    given = torch.stack([torch.ones_like(output), torch.full_like(output, 2.0)])
    return torch.autograd.grad(output, [weights(model)[0], weights(model)[4]], given, is_grads_batched=True)


def checkpointed(model: nn.Module) -> None:
    model.zero_grad()
    x = inputs().requires_grad_()
    checkpoint(model, x, use_reentrant=True).square().sum().backward()


def asked_in_a_hook(model: nn.Module) -> list[Tensor]:
    """Another graph's gradients, while those of this one are asked for."""
    model.zero_grad()
    found = []

    @torch.enable_grad()
    def ask(_gradient: Tensor) -> None:
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        found.extend(torch.autograd.grad(x.square().sum(), [x]))
        model(inputs(5)).sum().backward()

    output = model(inputs())
    output.register_hook(ask)
    return [*torch.autograd.grad(output.square().sum(), weights(model)), *found]


def test_what_is_not_in_the_graph_is_an_error(pair: Pair) -> None:
    stranger = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for model in (pair.plain, pair.fast):
        model.zero_grad()
        with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
            torch.autograd.grad(model(inputs()).sum(), [weights(model)[0], stranger])
    pair.both(all_asked)


def test_a_graph_that_is_spent_is_an_error_for_all(pair: Pair) -> None:
    for model in (pair.plain, pair.fast):
        losses = [model(inputs()).square().sum() for _ in range(2)]
        sum(losses).backward()  # type: ignore[union-attr]
        first = weights(model)[0]
        for loss in (losses[0], losses[1] + first.sum()):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(loss, first, allow_unused=True)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward(inputs=weights(model))
        model.zero_grad()
    pair.both(step)


def test_two_networks_in_one_backward() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([three(), three()])

    def capture(model: Any) -> nn.Module:
        for part in model.parts:
            on_captured(part)
        return model

    def train(model: Any) -> None:
        model.zero_grad()
        for seed in range(2):
            first, second = model.parts
            (first(inputs(seed)) * second(inputs(seed + 7))).sum().backward()

    both = Pair(capture, Both, calls=0)
    for _ in range(5):
        both.both(train)
    assert all(owes(part(inputs())) for part in both.fast.parts)  # type: ignore[union-attr]


def test_no_more_runs_than_is_asked_for() -> None:
    """Gradients of one network through another, whose own backward is still to come."""

    class Rivals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = three(), nn.Sequential(nn.Linear(2, 6), Three())

    def capture(rivals: Any) -> nn.Module:
        on_captured(rivals.first)
        on_captured(rivals.second[1])
        return rivals

    def contest(rivals: Any) -> list[Tensor]:
        rivals.zero_grad()
        made = rivals.first(inputs())
        loss = rivals.second(made).square().sum()
        found = torch.autograd.grad(loss, weights(rivals.second))
        made.sum().backward()  # through first, whose graph is still there
        return [*found, made.detach()]

    rivals = Pair(capture, Rivals, calls=0)
    for _ in range(6):
        rivals.both(contest)
    assert owes(rivals.fast.first(inputs()))


class Hooked:
    """A hook on one parameter, and what it was called with."""

    def __init__(self, hook: Callable[[nn.Module, list[Tensor]], Any]) -> None:
        self.hook = hook

    def early(self, model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        handle = self.hook(model, seen)
        model(inputs()).square().sum().backward()
        handle.remove()
        return seen

    def late(self, model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        loss = model(inputs()).square().sum()
        handle = self.hook(model, seen)
        loss.backward()
        handle.remove()
        return seen

    def late_for_two_calls(self, model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        loss = (model(inputs()) * model(inputs(1))).sum()
        handle = self.hook(model, seen)
        loss.backward()
        handle.remove()
        return seen


def doubles(model: nn.Module, seen: list[Tensor]) -> Any:
    return weights(model)[0].register_hook(lambda g: seen.append(g.clone()) or 2 * g)


def steps(model: nn.Module, seen: list[Tensor]) -> Any:
    def step_at_once(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad.clone())
        parameter.grad = None

    return weights(model)[3].register_post_accumulate_grad_hook(step_at_once)


def waits_for_all(model: nn.Module, seen: list[Tensor]) -> Any:
    return register_multi_grad_hook(weights(model), lambda gradients: seen.extend(g.clone() for g in gradients))


@pytest.mark.parametrize("hook", [doubles, steps, waits_for_all])
def test_hooks(pair: Pair, hook: Callable[[nn.Module, list[Tensor]], Any]) -> None:
    hooked = Hooked(hook)
    for _ in range(2):
        for use in (hooked.early, hooked.late, hooked.late_for_two_calls, step):
            pair.both(use)


def test_a_hook_sees_what_is_asked_for(pair: Pair) -> None:
    def ask(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        loss = model(inputs()).square().sum()
        handle = weights(model)[0].register_hook(lambda g: 0 * g)
        found = torch.autograd.grad(loss, weights(model))
        handle.remove()
        assert not found[0].any()
        return [*found]

    for _ in range(2):
        pair.both(ask)


def test_a_node_that_the_script_holds() -> None:
    """As optimizers hook it that step in the middle of backward."""
    torch.manual_seed(0)
    plain = three().double()
    fast = on_captured(copy.deepcopy(plain))
    seen: list[list[Tensor]] = [[], []]
    nodes = [get_gradient_edge(weights(model)[0]).node for model in (plain, fast)]
    for node, own in zip(nodes, seen, strict=True):
        node.register_hook(lambda *_, own=own, node=node: own.append(node.variable.grad.clone()))
    for _ in range(6):
        for model in (plain, fast):
            step(model)
    assert not owes(fast(inputs()))
    assert len(seen[1]) == 6
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(theirs, mine, **TOLERANCE)


def test_a_graph_that_is_alive_holds_no_node() -> None:
    """Most scripts still have their last loss when a network is recorded."""
    model = on_captured(three().double())
    kept = []
    for _ in range(4):
        kept.append(model(inputs()).square().sum())
        kept[-1].backward()
    assert owes(model(inputs()))


def test_it_is_imported_anywhere() -> None:
    """In inference mode, with another default device."""
    script = (
        "import torch\n"
        "torch.set_default_device('meta')\n"
        "with torch.inference_mode():\n"
        "    from mpsrun.run import owing\n"
        "p = torch.nn.Parameter(torch.zeros(2, device='cpu'))\n"
        "node = torch.autograd.graph.get_gradient_edge(p).node\n"
        "assert owing.nodes_are_held([p])\n"
        "del node\n"
        "assert not owing.nodes_are_held([p])\n"
    )
    subprocess.run([sys.executable, "-c", script], env=with_package(os.environ), check=True, timeout=60)


def test_distributed_training_keeps_its_nodes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    outputs = [model(inputs()) for model in (pair.plain, pair.fast)]
    assert not owes(outputs[1])
    pair.both(step)


class Pays(torch.autograd.Function):
    """What a replay does that has computed something that is not a number: nothing else looks at it."""

    @staticmethod
    def forward(ctx: Any, debt: owing.Debt, token: Tensor) -> Tensor:
        ctx.debt = debt
        return torch.ones(2)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, None]:
        ctx.debt.pay(ctx, [torch.tensor([1.0, torch.nan])], True)
        return None, None


def test_anomalies_are_found() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    debt = owing.Debt([parameter])
    output = Pays.apply(debt, debt.token)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="nan values in its 0th output"):
        output.sum().backward(retain_graph=True)
    assert parameter.grad is None
    output.sum().backward()
    assert parameter.grad is not None


def frozen_before_backward(model: nn.Module) -> None:
    """As a discriminator is through which a generator learns."""
    model.zero_grad()
    loss = model(inputs()).square().sum()
    model.requires_grad_(False)
    loss.backward()
    model.requires_grad_(True)


def hooked_while_frozen(model: nn.Module) -> None:
    model.zero_grad()
    loss = model(inputs()).square().sum()
    weights(model)[0].requires_grad_(False)
    handle = weights(model)[1].register_hook(lambda g: 2 * g)
    loss.backward()
    handle.remove()
    model.requires_grad_(True)


def sparse_before(model: nn.Module) -> list[Tensor]:
    """A gradient that another use of the parameter has left."""
    model.zero_grad()
    first = weights(model)[0]
    first.grad = torch.ones_like(first).to_sparse()
    model(inputs()).square().sum().backward()
    assert first.grad.layout is torch.strided
    return [first.grad]


def shared_gradients(model: nn.Module) -> None:
    """Two parameters have one tensor for theirs."""
    model.zero_grad()
    paths: Any = model.get_submodule("paths")
    first, second = paths[0][0].weight, paths[1][0].weight
    first.grad = second.grad = torch.zeros_like(first)
    for _ in range(2):
        model(inputs()).square().sum().backward()


def another_dtype(model: nn.Module) -> list[Tensor]:
    """Of the gradient, from now on."""
    model.zero_grad()
    first: Any = weights(model)[0]
    first.grad_dtype = torch.float32
    loss = model(inputs()).square().sum()
    (asked,) = torch.autograd.grad(loss, first, retain_graph=True)
    loss.backward()
    assert first.grad.dtype == asked.dtype == torch.float32
    found = [first.grad.double(), asked.double()]
    first.grad, first.grad_dtype = None, torch.float64
    return found


def graph_outside_of_grad_mode(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    first = weights(model)[0]
    loss = model(inputs()).square().sum() + first.square().sum()
    with torch.no_grad():
        (slope,) = torch.autograd.grad(loss, first, create_graph=True)
    assert slope.requires_grad
    return [slope.detach()]


def two_calls(model: nn.Module) -> None:
    model.zero_grad()
    (model(inputs()) * model(inputs(1))).sum().backward()


def graphs_that_add_up(model: nn.Module) -> None:
    """A gradient with a graph stays, and what is added to it later has none."""
    model.zero_grad()
    model(inputs()).square().sum().backward(create_graph=True)
    before = weights(model)[0].grad
    model(inputs(1)).square().sum().backward()
    after = weights(model)[0].grad
    assert before is not None
    assert after is not None
    assert after.requires_grad
    for p in weights(model):
        p.grad = None if p.grad is None else p.grad.detach()


def leaf_gradients(model: nn.Module) -> None:
    """Gradients that require one themselves."""
    for p in weights(model):
        p.grad = torch.ones_like(p, requires_grad=True)
    model(inputs()).square().sum().backward()
    for p in weights(model):
        p.grad = None if p.grad is None else p.grad.detach()


def asked_beside_it(model: nn.Module) -> list[Tensor]:
    """In a hook, through an engine that does not come through here, for something that no parameter is."""
    model.zero_grad()
    found = []

    @torch.enable_grad()
    def ask(_gradient: Tensor) -> None:
        x = inputs(5).requires_grad_()
        loss = model(x).square().sum()
        found.extend(owing._engine((loss,), (torch.ones_like(loss),), False, False, (x,), False, False))

    output = model(inputs())
    output.register_hook(ask)
    output.square().sum().backward()
    return found


class Named(torch.autograd.Function):
    """Has an attribute that nodes of leaves have, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.variable = weight
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient, None


def edge_of_a_function(model: nn.Module) -> Sequence[Tensor]:
    model.zero_grad()
    output = model(inputs())
    named = Named.apply(output, weights(model)[0])
    return torch.autograd.grad(named.square().sum(), [get_gradient_edge(named)])


USES: list[Use] = [
    all_asked,
    some_asked,
    only_others_asked,
    some_accumulate,
    edges_asked,
    two_batches,
    zeroed_in_place,
    kept_graph,
    kept_and_asked,
    used_twice,
    differentiated_twice,
    with_a_graph,
    batched,
    checkpointed,
    asked_in_a_hook,
    graphs_that_add_up,
    leaf_gradients,
    asked_beside_it,
    edge_of_a_function,
    frozen_before_backward,
    hooked_while_frozen,
    sparse_before,
    shared_gradients,
    another_dtype,
    graph_outside_of_grad_mode,
    two_calls,
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_uses(pair: Pair, use: Use) -> None:
    for _ in range(3):
        pair.both(use)
        pair.both(step)


def test_parameters_that_are_tied_later(pair: Pair) -> None:
    """The graph still has both, which are one: both parts arrive, one after the other."""

    def tied(model: nn.Module) -> None:
        model.zero_grad(set_to_none=False)
        for seed in range(2):
            model(inputs(seed)).square().sum().backward()

    for model in (pair.plain, pair.fast):
        paths: Any = model.get_submodule("paths")
        paths[1][0].weight = paths[0][0].weight
    for _ in range(6):
        pair.both(tied)


def test_engines_of_others_stay(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has wrapped torch's function after this did is still called."""
    entered: list[int] = []
    ours = torch.autograd.graph._engine_run_backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        entered.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counted)
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", counted)
    for _ in range(3):
        pair.fast(inputs()).sum().backward()
    assert len(entered) >= 3  # what stands in for a recording enters it, too


def test_an_engine_that_is_entered_otherwise(pair: Pair) -> None:
    """Without torch's function in Python, as from C++."""

    def enter(model: nn.Module) -> None:
        model.zero_grad()
        for seed in range(2):
            loss = model(inputs(seed)).square().sum()
            owing._engine((loss,), (torch.ones_like(loss),), False, False, (), True, True)

    for _ in range(3):
        pair.both(enter)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], 1)


def test_gradients_are_laid_out_as_parameters_are() -> None:
    """Also where a parameter is a part of other memory."""

    def make() -> nn.Module:
        model = Images().to(memory_format=torch.channels_last)
        wide = torch.randn(8, 3, 3, 3)
        model.paths[1].weight = nn.Parameter(wide[::2])
        return model

    def train(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [torch.tensor(p.grad.stride()) for p in weights(model) if p.grad is not None]

    images = torch.randn(2, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    pair = Pair(on_captured, make, calls=0)
    for _ in range(5):
        pair.both(train)
    assert owes(pair.fast(images))


def test_backward_in_another_thread(pair: Pair) -> None:
    def elsewhere(model: nn.Module) -> Sequence[Tensor]:
        model.zero_grad()
        first, second = model(inputs()).square().sum(), model(inputs(1)).square().sum()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(first.backward).result()
            return threads.submit(torch.autograd.grad, second, weights(model)).result()

    for _ in range(3):
        pair.both(elsewhere)


def test_two_threads_ask_for_their_own(pair: Pair) -> None:
    """What one asks for does not get to the other's parameters."""
    mine, theirs = pair.fast, Pair(on_captured, three, calls=3).fast
    wanted = [torch.autograd.grad(model(inputs()).square().sum(), weights(model)) for model in (mine, theirs)]
    together = threading.Barrier(2)

    def ask(model: nn.Module) -> list[Sequence[Tensor]]:
        together.wait(30)
        return [torch.autograd.grad(model(inputs()).square().sum(), weights(model)) for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        for found, want in zip(threads.map(ask, (mine, theirs)), wanted, strict=True):
            for gradients in found:
                torch.testing.assert_close(gradients, want, **TOLERANCE)


class Stream:
    """Of a GPU; notes who waits for whom."""

    def __init__(self, name: str, waits: list[str]) -> None:
        self.name, self.waits = name, waits

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(f"{self.name} for {other.name}")


@pytest.mark.parametrize("asks", [True, False], ids=["grad", "backward"])
def test_streams_wait_for_each_other(pair: Pair, monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    """The script's until gradients are there, and the one that uses their memory next until they have been read."""
    waits: list[str] = []
    script, side = Stream("script", waits), Stream("side", waits)
    current = [script]
    pay, together = owing.Debt.pay, owing._totals

    def pay_on_side(self: owing.Debt, *args: Any) -> None:
        current[0] = side
        pay(self, *args)
        current[0] = script

    def noted(*args: Any) -> Any:
        waits.append("read")
        return together(*args)

    monkeypatch.setattr(owing, "_stream", lambda _: current[0])
    monkeypatch.setattr(owing.Debt, "pay", pay_on_side)
    monkeypatch.setattr(owing, "_totals", noted)
    loss = pair.fast(inputs()).square().sum()
    if asks:
        torch.autograd.grad(loss, weights(pair.fast))
    else:
        loss.backward()
    assert waits[-3:] == ["script for side", "read", "side for script"]


def test_debts_go_with_their_calls(pair: Pair) -> None:
    pair.fast(inputs()).sum().backward()
    pair.fast(inputs())
    gc.collect()
    assert len(owing._debts) == 0
