"""Watches the gradients of one call from outside: what comes in at its outputs, and what comes out at its inputs.

    Enter(input or parameter) -> the same, for the lanes     backward: takes down the gradient that comes out
    Leave(output) -> the same, for the script                backward: takes down the gradient that comes in

Every tensor has one of its own, so that a backward pass reaches just what it would reach without them. Once the pass is
over, the gradients that came in are sent through a plain run of the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from mpsrun import log

Judge = Callable[[Mapping[int, tuple[torch.Tensor | None, torch.Tensor | None]]], None]


class Gates:
    """The Enters and Leaves of one call.

    judge: is given the gradients of each backward pass, by argument: that of the lanes, and that of the plain run. What
    it raises ends the pass. is_over: a backward pass has been judged.
    """

    def __init__(self, judge: Judge) -> None:
        self.is_over = False
        self._judge = judge
        self._task: int | None = None  # the backward pass that is under way
        self._came_in: dict[int, torch.Tensor] = {}
        self._came_out: dict[int, torch.Tensor] = {}
        # Hangs on every Leave: a pass that asks for the gradients of chosen tensors will not go there.
        self._probe = torch.zeros(0, requires_grad=True).clone()

    def enter(self, args: Sequence[Any], watched: Collection[int]) -> list[Any]:
        """The arguments for the lanes; the watched ones are new tensors on the same memory."""
        return [_Enter.apply(self, i, arg) if i in watched else arg for i, arg in enumerate(args)]

    def leave(self, outputs: Sequence[Any], plain: Sequence[Any], leaves: Mapping[int, torch.Tensor]) -> list[Any]:
        """The outputs for the script; `plain` are those of the plain run, `leaves` what it took, by argument."""
        self._leaves = leaves
        self._plain = {j: x for j, x in enumerate(plain) if isinstance(x, torch.Tensor) and x.requires_grad}
        return [_Leave.apply(self, j, x, self._probe) if j in self._plain else x for j, x in enumerate(outputs)]

    def take_in(self, output: int, gradient: torch.Tensor | None) -> None:
        """The gradient of an output has come in."""
        if torch.is_grad_enabled():
            log.detail("not verified: gradients that can be differentiated again")
            return
        if self._task != torch._C._current_graph_task_id():
            self._begin()
        if gradient is not None:
            self._came_in[output] = gradient

    def take_out(self, arg: int, gradient: torch.Tensor | None) -> None:
        """The gradient of an argument is on its way to the script, whose hooks may change it."""
        if gradient is not None and self._task == torch._C._current_graph_task_id():
            self._came_out[arg] = gradient.detach().clone()

    def _begin(self) -> None:
        self._task = torch._C._current_graph_task_id()
        self._came_in, self._came_out = {}, {}
        self._whole = torch._C._will_engine_execute_node(self._probe.grad_fn)  # type: ignore[arg-type]
        self._keep = bool(torch._C._autograd._get_current_graph_task_keep_graph())
        self._versions = self._current_versions()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        came_in, came_out = self._came_in, self._came_out
        self._task, self._came_in, self._came_out = None, {}, {}
        if self._versions != self._current_versions():
            log.detail("not verified: gradients of weights that change within the backward pass")
            return
        wanted = self._plain_gradients(came_in)
        self.is_over = True
        self._judge({i: (came_out.get(i), wanted[i]) for i in wanted if self._whole or i in came_out})

    def _plain_gradients(self, came_in: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor | None]:
        if not came_in:
            return dict.fromkeys(self._leaves)
        gradients = torch.autograd.grad(
            [self._plain[j] for j in came_in],
            list(self._leaves.values()),
            list(came_in.values()),
            retain_graph=self._keep or not self._whole,  # the parts that were not asked for may be asked for next
            allow_unused=True,
        )
        return dict(zip(self._leaves, gradients, strict=True))

    def _current_versions(self) -> list[int]:
        return [leaf._version for leaf in self._leaves.values()]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Gates, index: int, arg: torch.Tensor) -> torch.Tensor:
        ctx.gates, ctx.index = gates, index
        ctx.set_materialize_grads(False)
        return arg.detach()  # shares memory and version: a change between forward and backward is seen as before

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.gates.take_out(ctx.index, gradient)
        return None, None, gradient


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Gates, index: int, output: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
        ctx.gates, ctx.index = gates, index
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.gates.take_in(ctx.index, gradient)
        return None, None, gradient, None
