"""Branches written down as such: for networks that Dynamo cannot see through, or simply to say what is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mpsrun.errors import UsageError
from mpsrun.run import backend

Join = str | Callable[[Sequence[Any]], Any]


class Branches(nn.ModuleList):
    """Modules that take the same inputs and do not depend on each other, and how their outputs are joined.

        block = mpsrun.Branches([tower_a, tower_b, tower_c], join="cat")
        y = block(x)

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all branches on the same arguments and join their outputs."""
        if torch.compiler.is_compiling():  # part of a larger network, whose regions are found as a whole
            return self._plain(*args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, backend=backend.mpsrun)
        return self._compiled(*args, **kwargs)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [branch(*args, **kwargs) for branch in self]
        if self.join == "cat":
            return torch.cat(outputs, 1)
        if self.join == "sum":
            total = outputs[0]
            for output in outputs[1:]:
                total = total + output
            return total
        return self.join(outputs)  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        """What can be copied and pickled: everything but the compiled call."""
        return {**self.__dict__, "_compiled": None}
