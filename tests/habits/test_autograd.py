"""Autograd beyond one forward and one backward: each habit done plainly and on lanes, with the same result."""

import copy
from typing import Any

import pytest
import torch
from alike import FIRST, LAST, Seen, gradients, parameter, same, state, sum_of, train, warm_up, x
from networks import Heads, Three
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transparency import on_lanes

from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.usefixtures("workers")


def test_several_forwards_before_one_backward(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        sum_of(torch.stack([model(x(i)) for i in range(5)])).backward()
        return state(model)

    same(script, calls=10)


def test_backwards_in_another_order_than_forwards(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        outputs = [model(x(i)) for i in range(4)]
        for i in (2, 0, 3, 1):
            sum_of(outputs[i]).backward()
        return state(model)

    same(script, calls=8)


def test_retain_graph(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        loss.backward(retain_graph=True)
        first = gradients(model)
        loss.backward(retain_graph=True)
        loss.backward()
        return {**{f"first {n}": g for n, g in first.items()}, **gradients(model)}

    same(script)


def test_second_backward_raises() -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        train(model, 2)
        return state(model)

    same(script)


@pytest.mark.parametrize("name", ["paths.0.0.weight", "paths.1.3.bias", "paths.2.0.weight", "trunk.weight"])
def test_gradient_of_one_parameter(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        (one,) = torch.autograd.grad(loss, [parameter(model, name)], retain_graph=True)
        seen = {"one": one, **{f"untouched {n}": g for n, g in gradients(model).items()}}
        loss.backward()
        sum_of(model(x(1))).backward()
        return {**seen, **state(model)}

    same(script)


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_gradient_of_one_parameter_only(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            (seen[str(i)],) = torch.autograd.grad(sum_of(model(x(i))), [parameter(model, name)])
        return {**seen, **{n: p.grad for n, p in model.named_parameters()}}

    same(script)


@pytest.mark.parametrize("kept", ["a", "b", "c"])
def test_parameters_without_gradient(kept: str, nothing_kept: None) -> None:
    """Nothing is handed to parameters that no gradient reaches: they stay None, and no hook fires."""

    def script(model: nn.Module) -> Seen:
        fired: list[str] = []
        for name, p in model.named_parameters():
            p.register_hook(lambda _, name=name: fired.append(name))
            p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(f"after {name}"))
        model(x())[kept].sum().backward()
        return {"fired": sorted(fired), **gradients(model)}

    same(script, make=Heads)


@pytest.mark.parametrize("name", [FIRST, LAST, "trunk.weight", "head.weight"])
def test_hook_that_raises(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        def refuse(_: Tensor) -> None:
            raise KeyError("a hook of the user's")

        handle = parameter(model, name).register_hook(refuse)
        for i in range(3):
            with pytest.raises(KeyError, match="a hook of the user's"):
                sum_of(model(x(i))).backward()
        handle.remove()
        model.zero_grad()
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script)


def test_gradient_accumulation(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        for i in range(4):
            (sum_of(model(x(i))) / 4).backward()
        return state(model)

    same(script)


def test_evaluation_with_gradients(nothing_kept: None) -> None:
    """Adversarial examples: gradients of the input, with the model in eval mode."""

    def script(model: nn.Module) -> Seen:
        model.eval()
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            sum_of(model(given)).backward()
            seen[f"gradient of input {i}"] = given.grad
        return {**seen, **state(model)}

    same(script, calls=4)


def test_gradient_penalty(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            output = model(given)
            (slope,) = torch.autograd.grad(output.sum(), given, create_graph=True)
            (sum_of(output) + slope.norm(dim=1).sub(1).square().sum()).backward()
            seen |= {f"slope {i}": slope.detach(), f"gradient of input {i}": given.grad}
        return {**seen, **state(model)}

    same(script, calls=4)


def test_second_derivatives_of_parameters(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        some = [parameter(model, FIRST), parameter(model, LAST)]
        first = torch.autograd.grad(sum_of(model(x())), some, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), some)  # type: ignore[arg-type]
        return {**{f"first {i}": g.detach() for i, g in enumerate(first)}, "0": second[0], "1": second[1]}

    same(script)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            sum_of(checkpoint(model, given, use_reentrant=reentrant)).backward()
            seen[f"gradient of input {i}"] = given.grad
        return {**seen, **state(model)}

    same(script, calls=0 if not reentrant else 4)


class TwoEnds(nn.Module):
    """A worker's output that is saved by an op of the lead, on the way to a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (path(x) for path in self.paths)
        return (a + b + c).sum(), torch.addcmul(a, b * c, self.weight).sum()


def test_two_outputs_differentiated_apart(workers: Coordinator) -> None:
    """What autograd still holds of a worker's output stays as it was while later steps run."""
    torch.manual_seed(0)
    plain = TwoEnds().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for _ in range(4):
        x, later = torch.randn(4, 6).double(), torch.randn(4, 6).double()
        seen = []
        for model in (plain, fast):
            _, second = model(x)
            first, _ = model(x)
            first.backward()
            model(later)
            seen.append(torch.autograd.grad(second, [model.weight])[0])
        torch.testing.assert_close(seen[1], seen[0])


def test_kept_tensors_stay(nothing_kept: None) -> None:
    """Gradients and outputs that a script keeps are its own: later steps do not write into them."""
    model = on_lanes(Heads().double(), 2)
    warm_up(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(6):
        model.zero_grad()
        outputs = model(x(i))
        sum_of(outputs).backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        kept += [(tensor.detach(), tensor.detach().clone()) for tensor in (*outputs.values(), *found)]
    for tensor, value in kept:
        assert torch.equal(tensor, value)


class LateReader(Three):
    """A branch of one region is read again after the next region: detached, or without gradients at all."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.paths[0](x), self.paths[2](x)
        joined = torch.tanh(first + second)
        third, fourth = self.more[0](joined), self.more[1](joined)
        late = first.detach() * second.detach() if self.detach else first * second
        return torch.tanh(third + fourth) + late


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_outputs_that_are_read_late(mode: Any, detach: bool, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        with mode():
            return {f"output {i}": model(x(i)).detach().clone() for i in range(5)}

    same(script, make=lambda: LateReader(detach), calls=6)
