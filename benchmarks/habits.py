"""What training scripts do between and around their steps, as functions that change a network under training.

Each takes a `Trainee` and a seed, and returns the tensors that it saw. Run in any order on two networks that started
alike, one plain and one on lanes, they must see the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

WIDTH = 6
# The gradient of a bias before a BatchNorm is nothing but rounding, which Adam would scale up to a step.
EPS = 1e-3


class Forking(nn.Module):
    """A trunk, branches of several depths and kinds, an inner fork, a head."""

    def __init__(self, branches: int = 3, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.paths = nn.ModuleList(self._path(i, width) for i in range(branches))
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4 * branches + 4, 2)

    @staticmethod
    def _path(index: int, width: int) -> nn.Sequential:
        norm: nn.Module = nn.BatchNorm1d(width) if index % 2 == 0 else nn.LayerNorm(width)
        more = [nn.Linear(width, width), nn.GELU()] * (index % 3)
        return nn.Sequential(nn.Linear(WIDTH, width), norm, nn.Tanh(), *more, nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        found = [path(x) for path in self.paths]
        left, right = (torch.tanh(inner(found[0])) for inner in self.inner)
        return torch.tanh(self.head(torch.cat([*found, left * right], 1)))


@dataclass
class Trainee:
    """A network under training with what a script keeps beside it."""

    model: Forking
    optimizer: torch.optim.Optimizer = field(init=False)
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.new_optimizer()

    def new_optimizer(self, kind: int = 0) -> None:
        """Forget the optimizer's state and take one of another kind."""
        parameters = list(self.model.parameters())
        self.optimizer = (
            torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
            torch.optim.AdamW(parameters, lr=0.005, eps=EPS, foreach=True),
            torch.optim.Adam(parameters, lr=0.005, eps=EPS, fused=True),
        )[kind % 3]

    def batch(self, seed: int, rows: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        like = next(self.model.parameters())
        return torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator).to(like)

    def loss(self, seed: int, rows: int = 5) -> Tensor:
        return self.model(self.batch(seed, rows)).square().sum()


Habit = Callable[[Trainee, int], list[Tensor]]


def step(t: Trainee, seed: int, rows: int = 5, to_none: bool = True) -> list[Tensor]:
    t.optimizer.zero_grad(set_to_none=to_none)
    loss = t.loss(seed, rows)
    loss.backward()
    nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
    t.optimizer.step()
    return [loss.detach()]


def steps(t: Trainee, seed: int) -> list[Tensor]:
    return [loss for i in range(3) for loss in step(t, seed + i, to_none=seed % 2 == 0)]


def other_batch_sizes(t: Trainee, seed: int) -> list[Tensor]:
    return [*step(t, seed, rows=5 - seed % 4), *step(t, seed + 1)]


def accumulated(t: Trainee, seed: int) -> list[Tensor]:
    t.optimizer.zero_grad()
    losses = [t.loss(seed + i) for i in range(3)]
    for loss in reversed(losses):
        loss.backward()
    t.optimizer.step()
    return [loss.detach() for loss in losses]


def one_backward_for_several(t: Trainee, seed: int) -> list[Tensor]:
    t.optimizer.zero_grad()
    loss = torch.stack([t.loss(seed + i) for i in range(3)]).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    nn.utils.clip_grad_value_(t.model.parameters(), 0.1)
    t.optimizer.step()
    return [loss.detach()]


def forgotten_forwards(t: Trainee, seed: int) -> list[Tensor]:
    return [t.model(t.batch(seed + i)).detach() for i in range(4)]


def evaluated(t: Trainee, seed: int) -> list[Tensor]:
    modes = [module.training for module in t.model.modules()]
    t.model.eval()
    with torch.no_grad() if seed % 2 else torch.inference_mode():
        found = [t.model(t.batch(seed + i, 4)).clone() for i in range(2)]
    for module, training in zip(t.model.modules(), modes, strict=True):
        module.training = training
    return found


def slopes(t: Trainee, seed: int) -> list[Tensor]:
    x = t.batch(seed).requires_grad_()
    (slope,) = torch.autograd.grad(t.model(x).sum(), x, create_graph=seed % 2 == 0)
    if slope.requires_grad:
        t.optimizer.zero_grad()
        slope.square().sum().backward()
    return [slope.detach()]


def checkpointed(t: Trainee, seed: int) -> list[Tensor]:
    x = t.batch(seed).requires_grad_()
    checkpoint(t.model, x, use_reentrant=bool(seed % 2)).sum().backward()
    return [x.grad] if x.grad is not None else []


def reduced_precision(t: Trainee, seed: int) -> list[Tensor]:
    x = t.batch(seed)
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = t.model(x).float().square().mean()
    t.optimizer.zero_grad()
    loss.backward()
    return [loss.detach()]


def frozen_or_not(t: Trainee, seed: int) -> list[Tensor]:
    path = t.model.paths[seed % len(t.model.paths)]
    path.requires_grad_(not next(path.parameters()).requires_grad)
    t.optimizer.zero_grad()
    return []


def mode_of_a_part(t: Trainee, seed: int) -> list[Tensor]:
    path = t.model.paths[seed % len(t.model.paths)]
    path.train(not path.training)
    return []


def shrunk(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:  # noqa: ARG001 - a hook's
    return output * 0.9


def hooked_or_not(t: Trainee, seed: int) -> list[Tensor]:
    if t.handles:
        t.handles.pop().remove()
        return []
    layer = t.model.paths[seed % len(t.model.paths)][0]
    t.handles.append(layer.register_forward_hook(shrunk))
    return []


def parametrised_or_not(t: Trainee, seed: int) -> list[Tensor]:
    layer = t.model.paths[seed % len(t.model.paths)][0]
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    else:
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
    t.new_optimizer()
    return []


def data_replaced(t: Trainee, seed: int) -> list[Tensor]:
    for p in list(t.model.parameters())[seed % 3 :: 3]:
        p.data = p.data * 0.9
    return []


def loaded(t: Trainee, seed: int) -> list[Tensor]:
    file = io.BytesIO()
    torch.save(t.model.state_dict(), file)
    file.seek(0)
    t.model.load_state_dict(torch.load(file), assign=seed % 2 == 0)
    if seed % 2 == 0:
        t.new_optimizer()
    return [torch.tensor(len(file.getvalue()))]


def other_optimizer(t: Trainee, seed: int) -> list[Tensor]:
    t.new_optimizer(seed)
    return []


def copied(t: Trainee, seed: int) -> list[Tensor]:
    other = Trainee(copy.deepcopy(t.model))
    return [*step(other, seed), *step(t, seed)]


@contextlib.contextmanager
def raises(words: str) -> Iterator[None]:
    """Fail where no RuntimeError with these words is raised."""
    try:
        yield
    except RuntimeError as error:
        if words not in str(error):
            raise
        return
    raise AssertionError(f"expected a RuntimeError that says {words!r}, found none")


def changed_before_backward(t: Trainee, seed: int) -> list[Tensor]:
    loss = t.loss(seed)
    with torch.no_grad():
        t.model.head.weight.mul_(0.99)
    with raises("modified by an inplace operation"):
        loss.backward()
    t.optimizer.zero_grad()
    return []


HABITS: tuple[Habit, ...] = (
    steps, other_batch_sizes, accumulated, one_backward_for_several, forgotten_forwards, evaluated, slopes,
    checkpointed, reduced_precision, frozen_or_not, mode_of_a_part, hooked_or_not, parametrised_or_not, data_replaced,
    loaded, other_optimizer, copied, changed_before_backward,
)  # fmt: skip
