"""Training loops: each habit done plainly and on lanes, with the same result."""

import copy
import gc
from typing import Any

import pool
import psutil
import pytest
import torch
from alike import LAST, Seen, parameter, same, state, sum_of, train, x
from networks import Three
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transparency import on_lanes

from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.usefixtures("workers")


def test_zeroed_gradients() -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 4, to_none=False)
        first = parameter(model, LAST).grad
        losses += train(model, 2, start=4, to_none=False)
        assert parameter(model, LAST).grad is first
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(mode: Any, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for epoch in range(3):
            seen[f"losses {epoch}"] = torch.stack(train(model, 2, start=epoch))
            model.eval()
            with mode():
                for i in range(3):
                    seen[f"evaluated {epoch} {i}"] = model(x(10 + i)).clone()
            model.train()
        return {**seen, **state(model)}

    same(script, calls=16)


@pytest.mark.parametrize("path", [0, 2])
def test_freezing_in_the_middle(path: int, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {"before": torch.stack(train(model, 2))}
        frozen = model.get_submodule(f"paths.{path}")
        frozen.requires_grad_(False)
        model.zero_grad()
        seen["frozen"] = torch.stack(train(model, 3, start=2))
        seen |= {f"frozen, {n}": value for n, value in state(model).items()}
        frozen.requires_grad_(True)
        seen["after"] = torch.stack(train(model, 3, start=5))
        return {**seen, **state(model)}

    same(script, calls=12)


def test_train_and_eval_by_part(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {"before": torch.stack(train(model, 2))}
        model.get_submodule("paths.1").eval()
        seen["one in eval mode"] = torch.stack(train(model, 3))
        return {**seen, **state(model)}

    same(script, calls=6)


def test_optimizer_on_copies(nothing_kept: None) -> None:
    """A deep copy of a compiled model, as for a moving average, is a model of its own."""

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        average = copy.deepcopy(model)
        for p in average.parameters():
            p.data.mul_(0.5)
        losses += [*train(average, 3), *train(model, 3)]
        return {
            "losses": torch.stack(losses),
            **state(model),
            **{f"average {n}": v for n, v in state(average).items()},
        }

    same(script, calls=10)


def test_models_in_turn(nothing_kept: None) -> None:
    """A generator and its critic: one's output is the other's input."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = Three(), Three()
            self.generator.head = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.critic(self.generator(x))

    def script(model: nn.Module) -> Seen:
        losses = []
        for i in range(3):
            fake = model.get_submodule("generator")(x(i))
            losses.append(sum_of(model.get_submodule("critic")(fake.detach())))
            losses[-1].backward()
            losses.append(sum_of(model(x(i))))
            losses[-1].backward()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Pair, calls=6)


def test_forwards_without_backward_leave_nothing(workers: Coordinator, nothing_kept: None) -> None:
    """The slots are used again, and the workers forget the activations: 400 MB if they did not."""
    model = on_lanes(Three(width=512).double(), 2)
    batch = x(rows=256)
    train(model, 2)
    for _ in range(20):
        model(batch)
    processes = [psutil.Process(pid) for pid in pool.pids()]
    before = sum(process.memory_info().rss for process in processes)
    chunks = len(workers._arena.chunks)
    for _ in range(200):
        model(batch)
    pool.settle(workers)
    grown = sum(process.memory_info().rss for process in processes) - before
    assert grown < 40 << 20
    assert len(workers._arena.chunks) == chunks
    assert workers._arena.in_use <= 4


def test_looking_at_a_network_leaves_nothing(nothing_kept: None) -> None:
    """What backward will need is read off fake tensors, which go away."""

    def fakes() -> int:
        gc.collect()
        return sum(type(each) is FakeTensor and each.grad_fn is not None for each in gc.get_objects())

    before = fakes()
    train(on_lanes(Three().double(), 2), 2)
    torch._dynamo.reset()
    assert fakes() == before


def test_training_leaves_nothing(workers: Coordinator, nothing_kept: None) -> None:
    model = on_lanes(Three().double(), 2)
    train(model, 10)
    chunks = len(workers._arena.chunks)
    train(model, 100)
    assert len(workers._arena.chunks) == chunks
    assert workers._arena.in_use <= 4
