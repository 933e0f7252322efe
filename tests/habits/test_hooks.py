"""Hooks on modules, tensors and parameters, also where they come late, and parametrised or shared weights."""

from typing import Any

import pytest
import torch
from alike import FIRST, LAST, Seen, parameter, same, state, sum_of, train, x
from networks import Three
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")

INNER = ("paths.0.0", "paths.2.0", "paths.2", "head")


class Log:
    """Hooks that note what they are given."""

    def __init__(self) -> None:
        self.seen: Seen = {}

    def note(self, what: str, value: Any) -> None:
        self.seen[f"{len(self.seen)} {what}"] = value.detach().clone() if isinstance(value, Tensor) else value

    def before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.note("before", args[0])

    def after(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.note("after", output)

    def backward(self, _: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self.note("backward", outputs[0])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_late_hooks_on_modules(name: str, backward: bool) -> None:
    """Hooks come after the first steps on lanes, see what they would see plainly, and go again."""

    def script(model: nn.Module) -> Seen:
        log, inner = Log(), model.get_submodule(name)
        losses = train(model, 2)
        handles = [inner.register_forward_pre_hook(log.before), inner.register_forward_hook(log.after)]
        if backward:
            handles.append(inner.register_full_backward_hook(log.backward))
        losses += train(model, 3, start=2)
        for handle in handles:
            handle.remove()
        losses += train(model, 3, start=5)
        assert len(log.seen) == (9 if backward else 6)
        return {"losses": torch.stack(losses), **log.seen, **state(model)}

    same(script, calls=4 if backward else 8)  # Dynamo gives up on what has a backward hook


@pytest.mark.parametrize("name", ["", "paths.2.0"])
def test_late_hooks_that_change_values(name: str) -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        inner = model.get_submodule(name)
        handles = [
            inner.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
            inner.register_forward_hook(lambda _, args, output: output + args[0].mean()),
        ]
        losses += train(model, 3, start=2)
        for handle in handles:
            handle.remove()
        losses += train(model, 2, start=5)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=6)


def test_hook_of_a_class_of_modules() -> None:
    """A hook on every module there is, as profilers and summaries of networks set it."""

    def script(model: nn.Module) -> Seen:
        names = {module: name for name, module in model.named_modules()}
        called: list[str] = []
        losses = train(model, 2)
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, output: called.append(names[m]))
        losses += train(model, 2, start=2)
        handle.remove()
        losses += train(model, 2, start=4)
        return {"called": called, "losses": torch.stack(losses), **state(model)}

    same(script, calls=6)


def test_hooks_on_tensors() -> None:
    """On the input, on the output, and on parameters that come and go."""

    def script(model: nn.Module) -> Seen:
        log = Log()
        for i in range(4):
            given = x(i).requires_grad_()
            given.register_hook(lambda gradient: log.note("input", gradient))
            output = model(given)
            output.retain_grad()
            output.register_hook(lambda gradient: gradient * 2)
            handles = [parameter(model, n).register_hook(lambda g: g.clamp(-0.1, 0.1)) for n in (FIRST, LAST)[: i % 3]]
            sum_of(output).backward()
            log.note("gradient of input", given.grad)
            log.note("gradient of output", output.grad)
            for handle in handles:
                handle.remove()
        return {**log.seen, **state(model)}

    same(script, calls=6)


def test_hooks_on_tensors_inside() -> None:
    """A branch hangs a hook on a tensor of its own."""

    class Scaled(Three):
        def forward(self, x: Tensor) -> Tensor:
            found = [path(x) for path in self.paths]
            for i, tensor in enumerate(found):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient, i=i: gradient * (i + 1))
            return self.head(torch.cat(found, 1))

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    same(script, make=Scaled, calls=0)


def test_hooks_of_optimizers_and_checkpoints() -> None:
    def script(model: nn.Module) -> Seen:
        optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.05), []
        everywhere = register_optimizer_step_post_hook(lambda *_: steps.append("any"))
        optimizer.register_step_pre_hook(lambda *_: steps.append("before"))
        model.register_state_dict_post_hook(lambda module, found, prefix, _: found.update(extra=torch.ones(1)))
        losses = train(model, 3, optimizer=optimizer)
        everywhere.remove()
        return {"steps": steps, "losses": torch.stack(losses), **state(model)}

    same(script, calls=6)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Square(Three):
    """Branches that begin with a square matrix."""

    def __init__(self) -> None:
        super().__init__(width=6)


@pytest.mark.parametrize("name", ["paths.0.0", "paths.2.0"])
def test_parametrised_in_the_middle(name: str) -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", Symmetric())
        losses += train(model, 3, start=2)
        with parametrize.cached():
            losses += train(model, 2, start=5)
        seen = {f"parametrised {n}": value.clone() for n, value in model.state_dict().items()}
        parametrize.remove_parametrizations(layer, "weight")
        losses += train(model, 3, start=7)
        return {"losses": torch.stack(losses), **seen, **state(model)}

    same(script, make=Square, calls=10)


def test_parametrised_from_the_start() -> None:
    def make() -> nn.Module:
        model = Square()
        nn.utils.parametrizations.weight_norm(model.paths[0][0])
        nn.utils.parametrizations.orthogonal(model.paths[1][0])
        parametrize.register_parametrization(model.paths[2][0], "weight", Symmetric())
        return model

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    same(script, make=make, calls=4)


def test_pruned_in_the_middle() -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        layer = model.get_submodule("paths.2.0")
        prune.l1_unstructured(layer, "weight", amount=0.5)
        losses += train(model, 3, start=2)
        prune.remove(layer, "weight")
        losses += train(model, 3, start=5)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=10)


def test_tied_and_untied_in_the_middle() -> None:
    """Two branches share a weight from some step on, until one of them gets a copy of its own."""

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        one, other = model.get_submodule("paths.0.0"), model.get_submodule("paths.2.0")
        other.weight = one.weight
        losses += train(model, 3, start=2)
        assert other.weight is one.weight
        other.weight = nn.Parameter(one.weight.detach().clone())
        losses += train(model, 3, start=5)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=10)
