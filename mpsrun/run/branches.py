"""Branches written down as such: for networks that Dynamo cannot see through, or whose paths change at run time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mpsrun.errors import UsageError
from mpsrun.run import backend
from mpsrun.run.sets import Sets

STATES = 32  # of one branch that are compiled: train and eval, grad, frozen, autocast and sizes multiply

Join = str | Callable[[Sequence[Any]], Any]


class Branches(nn.ModuleList):
    """Modules that take the same inputs and do not depend on each other, and how their outputs are joined.

        block = mpsrun.Branches([tower_a, tower_b, tower_c], join="cat")
        y = block(x)
        y = block(x, active=[0, 2])     # tower_b is skipped in this call

    join: "cat" (along dimension 1), "sum", or a function of the list of outputs. The result is that of running the
    modules one after the other, on every lane. Parameters are named as in a `torch.nn.ModuleList`. Raises `UsageError`
    for an unknown join and for no modules.
    """

    def __init__(self, modules: Iterable[nn.Module], join: Join = "sum") -> None:
        super().__init__(modules)
        if not len(self):
            raise UsageError("expected at least one module for Branches, found none")
        if not callable(join) and join not in ("cat", "sum"):
            raise UsageError(f'expected join to be "cat", "sum" or a function, found {join!r}')
        self.join = join
        self._compiled: Callable[..., Any] | None = None
        self._sets: Sets | None = None

    def forward(self, *args: Any, active: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """Run branches on the same arguments and join their outputs.

        active: the numbers of the branches that run in this call, in the order in which `join` gets their outputs. The
        others are not touched: no statistics, no gradients, no hooks. No set is compiled by itself. Inside a network
        that is compiled as a whole, such a call is a graph break. Raises `UsageError` for an empty set, and for what
        is not the number of a branch or is there twice.
        """
        # The function of that name says yes to every compiler before torch 2.13.
        if active is not None and not torch.compiler._is_exporting_flag:
            return self._run_set(active, args, kwargs)
        if torch.compiler.is_compiling():  # part of a larger network, whose regions are found as a whole
            return self._plain(active, *args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, backend=backend.mpsrun)
        with _dynamo():
            return self._compiled(None, *args, **kwargs)

    # Disabled, since Dynamo would compile the surrounding network once for each set.
    @torch.compiler.disable(reason="branches are chosen per call")
    def _run_set(self, active: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen = _numbers(active, len(self))
        if self._sets is None:
            self._sets = Sets()
        with _dynamo():
            outputs = self._sets.run({number: self[number] for number in chosen}, args, kwargs)
        return self._joined(outputs)

    def _plain(self, active: Sequence[int] | None, *args: Any, **kwargs: Any) -> Any:
        chosen = range(len(self)) if active is None else _numbers(active, len(self))
        return self._joined([self[i](*args, **kwargs) for i in chosen])

    def _joined(self, outputs: list[Any]) -> Any:
        if self.join == "cat":
            return torch.cat(outputs, 1)
        if self.join == "sum":
            total = outputs[0]
            for output in outputs[1:]:
                total = total + output
            return total
        return self.join(outputs)  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        """What can be copied and pickled: everything but the compiled calls."""
        return {**self.__dict__, "_compiled": None, "_sets": None}


def _dynamo() -> AbstractContextManager[None]:
    """Dynamo's settings for branches: it must see hooks that are added late, and RNNs."""
    return torch._dynamo.config.patch(
        allow_rnn=True,
        skip_nnmodule_hook_guards=False,
        recompile_limit=max(STATES, torch._dynamo.config.recompile_limit),
    )


def _numbers(active: Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers in `active`, checked."""
    expected = f"expected active to be a sequence of different numbers from 0 to {count - 1}, at least one"
    if isinstance(active, torch.Tensor):  # reading it would wait for the GPU
        raise UsageError(f"{expected}; found a tensor: call `.tolist()` on it")
    numbers = _whole(active)
    if not numbers or len({*numbers}) < len(numbers) or not all(0 <= number < count for number in numbers):
        raise UsageError(f"{expected}; found {active!r}")
    return numbers


def _whole(values: Any) -> tuple[int, ...]:
    """The values as ints, those of numpy among them; nothing where that is not what they are."""
    if not hasattr(values, "__getitem__") or isinstance(values, Mapping):
        return ()
    if any(isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__") for value in values):
        return ()
    return tuple(operator.index(value) for value in values)
