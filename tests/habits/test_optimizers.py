"""Optimizers, schedules, clipping and averages of the weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from alike import EPS, Seen, gradients, same, state, sum_of, train, x
from torch import Tensor, nn
from torch.optim import swa_utils

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.01, eps=EPS, amsgrad=True, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, eps=EPS, fused=True),
    "Adagrad, one by one": lambda p: torch.optim.Adagrad(p, 0.05, eps=EPS, foreach=False),
    "RMSprop, maximize": lambda p: torch.optim.RMSprop(p, 0.001, eps=EPS, centered=True, maximize=True),
}


def told(optimizer: torch.optim.Optimizer) -> Seen:
    """The tensors of an optimizer's state."""
    found = optimizer.state_dict()["state"]
    return {f"{i} {n}": v.clone() for i, s in found.items() for n, v in s.items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    def script(model: nn.Module) -> Seen:
        optimizer = OPTIMIZERS[name](model.parameters())
        losses = train(model, 5, optimizer=optimizer)
        return {"losses": torch.stack(losses), **told(optimizer), **state(model)}

    same(script, calls=10)


def test_closure() -> None:
    def script(model: nn.Module) -> Seen:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum_of(model(x()))
            loss.backward()
            return loss

        losses = [torch.as_tensor(optimizer.step(closure)).detach() for _ in range(2)]  # type: ignore[arg-type]
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=10)


def test_groups_and_schedule() -> None:
    """Weight decay for matrices only, a warm-up, a cosine, and a group that is added on the way."""

    def script(model: nn.Module) -> Seen:
        head = {*model.get_submodule("head").parameters()}
        rest = [p for p in model.parameters() if p not in head]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02, eps=EPS)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [2])
        losses, rates = [], []
        for i in range(6):
            losses += train(model, 1, start=i, optimizer=optimizer)
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
        optimizer.add_param_group({"params": [*head], "lr": 0.01})
        losses += train(model, 2, start=6, optimizer=optimizer)
        return {"losses": torch.stack(losses), "rates": rates, **state(model)}

    same(script, calls=16)


@pytest.mark.parametrize("clip", ["norm", "norm, one by one", "value"])
def test_clipping(clip: str) -> None:
    def script(model: nn.Module) -> Seen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = {}
        for i in range(4):
            optimizer.zero_grad()
            (10 * sum_of(model(x(i)))).backward()
            if clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.1)
            else:
                seen[f"norm {i}"] = nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=clip == "norm")
            seen |= {f"step {i}, {name}": gradient for name, gradient in gradients(model).items()}
            optimizer.step()
        return {**seen, **state(model)}

    same(script, calls=8)


def test_optimizer_step_inside_backward() -> None:
    """Each parameter is updated as soon as its gradient is there, and the gradient is dropped."""

    def script(model: nn.Module) -> Seen:
        optimizers = {p: torch.optim.SGD([p], lr=0.02) for p in model.parameters()}

        def update(p: Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
        losses = []
        for i in range(4):
            losses.append(sum_of(model(x(i))))
            losses[-1].backward()
        for handle in handles:
            handle.remove()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, calls=8)


@pytest.mark.parametrize("kind", ["moving", "stochastic"])
def test_averaged_weights(kind: str) -> None:
    """Averages of the weights are trained along, evaluated in between, and get their batch statistics at the end."""

    def script(model: nn.Module) -> Seen:
        average = swa_utils.get_ema_multi_avg_fn(0.9) if kind == "moving" else None
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=kind == "moving")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        seen = {}
        for i in range(4):
            seen[f"loss {i}"] = torch.stack(train(model, 2, start=2 * i, optimizer=optimizer))
            averaged.update_parameters(model)
            schedule.step()
            with torch.no_grad():
                seen[f"averaged {i}"] = averaged.eval()(x(100)).clone()
        swa_utils.update_bn([x(i) for i in range(3)], averaged)
        seen |= {f"averaged {n}": value for n, value in averaged.module.state_dict().items()}
        return {**seen, "after": averaged(x(100)).detach(), **state(model)}

    same(script, calls=16)
