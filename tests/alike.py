"""A piece of a script that is run twice, on a plain model and on lanes, and must see the same."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pool
import torch
from networks import Three
from torch import Tensor, nn
from transparency import TOLERANCE, assert_same

from mpsrun.run import report
from mpsrun.run.in_place import compile_in_place

Seen = dict[str, Any]
Script = Callable[[nn.Module], Seen]
FIRST, LAST = "paths.0.0.weight", "paths.2.0.weight"  # of three branches, one of these two is a worker's
# The gradient of a bias before a BatchNorm is nothing but rounding, which Adam and its like would scale up to a step.
EPS = 1e-3
where = "cpu"  # the device of models and data; tests on a GPU set it


def same(
    script: Script, make: Callable[[], nn.Module] = Three, calls: int = 1, parts: Sequence[str] = ("",)
) -> list[report.Graph]:
    """What `script` sees is the same on a plain model and on one whose workers ran at least so often.

    The model is compiled in place as the launcher does it; where its parts are called one by one, each of them is.
    Returns the reports of its graphs.
    """
    torch.manual_seed(0)
    plain = make().to(where, torch.float64)
    fast = copy.deepcopy(plain)
    report.graphs.clear()
    for part in parts:
        warm_up(plain.get_submodule(part))
        compile_in_place(fast.get_submodule(part))
        warm_up(fast.get_submodule(part))
    before = executed()
    torch.manual_seed(1)
    wanted = script(plain)
    torch.manual_seed(1)
    found = script(fast)
    assert_same(found, wanted, "at the end", TOLERANCE)
    ran = executed() - before
    assert ran >= calls, f"expected at least {calls} forwards in workers, found {ran}"
    return report.graphs


def executed() -> int:
    """How many forwards the workers have run."""
    coordinator = pool.current()
    assert coordinator is not None
    return sum(sum(counts.forwards.values()) for counts in coordinator.counts().values())


def x(seed: int = 0, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator).to(where)


def warm_up(model: nn.Module) -> None:
    """The first call looks, the second one runs on lanes."""
    for _ in range(2):
        sum_of(model(x())).backward()
    model.zero_grad()


def sum_of(outputs: Any) -> Tensor:
    tensors = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def gradients(model: nn.Module) -> Seen:
    """The gradients as they are now."""
    return {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def state(model: nn.Module) -> Seen:
    return {**{n: value.clone() for n, value in model.state_dict().items()}, **gradients(model)}


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def train(
    model: nn.Module,
    steps: int,
    start: int = 0,
    to_none: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """A plain loop; the losses."""
    optimizer = optimizer or torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad(set_to_none=to_none)
        loss = sum_of(model(x(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses
