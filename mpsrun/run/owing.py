"""Gradients that go to parameters without a node of autograd's for each of them.

After the backward of a Function, autograd visits an AccumulateGrad for each of its parameters. On an H200's host that
takes 5 us for each in the thread that called backward, longer than all that is left to do for a small captured step. So
a call may leave its parameters out of the graph. It has a token in their place, and pays them itself what it owes.

    backward()                          pays each parameter as AccumulateGrad would: set it, or add it to what is there
    grad(y, parameters)                 asks for the token as well; what the call pays meanwhile is added to the result
    backward(inputs=parameters)         likewise, and then accumulates it
    grad or backward for other tensors  does not reach the token, so nothing is paid

Whoever looks on gets autograd's nodes: parameters with hooks, `torch.distributed`, which hooks the nodes, anomaly
detection, which looks at what comes out of a Function, and a script that holds the node of a parameter, which is how to
keep a hook on it.
"""

from __future__ import annotations

import gc
import operator
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_backward_hooks = operator.attrgetter("_backward_hooks")
_accumulate_hooks = operator.attrgetter("_post_accumulate_grad_hooks")
_is_leaf = operator.attrgetter("is_leaf")
_tokens: dict[torch.device, Tensor] = {}
_debts: weakref.WeakSet[Debt] = weakref.WeakSet()


class Debt:
    """One call's to its parameters.

    token: a leaf, what the call has in its graph in the place of them. Its node in autograd is as old as the call, and
    thus of the call's stream: when backward is through, the script's stream waits for that one.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.token = _token(parameters[0].device)
        _debts.add(self)

    def pay(self, ctx: Any, gradients: Sequence[Tensor | None], are_alike: bool) -> None:
        """In backward: hand over the gradients to whom the script has asked for.

        ctx: of the Function whose first tensor is the token. are_alike: whether each is laid out like its parameter, in
        memory that nobody else has.
        """
        pairs = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        if _asked.gradients is not None:
            for parameter, gradient in pairs:
                _asked.add(parameter, gradient)
        elif not torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
            return
        elif are_alike and not torch.is_grad_enabled() and not _has_hooks(self.parameters):
            _accumulate(pairs)
        elif pairs:
            parameters, given = zip(*pairs, strict=True)
            torch.autograd.backward(parameters, given, create_graph=torch.is_grad_enabled())


def may_owe(parameters: Sequence[Tensor]) -> bool:
    """Whether a call may leave these out of the graph: nobody would see it."""
    if not parameters or _has_hooks(parameters) or torch.is_anomaly_enabled():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    _see_what_is_asked()
    return all(map(_is_leaf, parameters))


def nodes_are_held(parameters: Sequence[Tensor]) -> bool:
    """Whether the script has autograd's node of one of these: looks through all objects, which takes some 10 ms."""
    ids = {id(parameter) for parameter in parameters}
    return any(type(o).__name__ == "AccumulateGrad" and id(o.variable) in ids for o in gc.get_objects())


def laid_out_alike(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether AccumulateGrad takes this for the parameter's gradient as it is, if it has none yet."""
    if gradient.layout is not torch.strided or getattr(parameter, "grad_dtype", gradient.dtype) != gradient.dtype:
        return False
    return gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride()


def _token(device: torch.device) -> Tensor:
    if device not in _tokens:
        _tokens[device] = torch.empty(0, device=device)
    return _tokens[device].detach().requires_grad_()


def _has_hooks(parameters: Sequence[Tensor]) -> bool:
    return any(map(_backward_hooks, parameters)) or any(map(_accumulate_hooks, parameters))


def _accumulate(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    sums, addends = [], []
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            sums.append(parameter.grad)
            addends.append(gradient)
    if sums:
        torch._foreach_add_(sums, addends)


# ---- what the script asks for


class _Asked(threading.local):
    """What is asked for in the backward of this thread. gradients: found so far by id; None where all accumulate."""

    gradients: dict[int, Tensor | None] | None = None

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        if self.gradients is not None and id(parameter) in self.gradients:
            before = self.gradients[id(parameter)]
            self.gradients[id(parameter)] = gradient if before is None else before + gradient


_asked = _Asked()
_engine = torch.autograd.graph._engine_run_backward


def _see_what_is_asked() -> None:
    """Have all backwards of the script come through here."""
    if torch.autograd._engine_run_backward is not _run_backward:
        torch.autograd._engine_run_backward = _run_backward  # type: ignore[assignment]
        torch.autograd.graph._engine_run_backward = _run_backward  # type: ignore[assignment]


def _run_backward(
    outputs: Any,
    gradients: Any,
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor | GradientEdge] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> Any:
    """In the place of what `backward` and `grad` of torch.autograd call."""
    leaves = [_leaf(given) for given in inputs]
    wanted = {id(leaf) for leaf in leaves if leaf is not None}
    debts = [debt for debt in [*_debts] if any(id(p) in wanted for p in debt.parameters)] if wanted else []
    if not debts and _asked.gradients is None:
        return _engine(outputs, gradients, keep_graph, create_graph, inputs, allow_unreachable, accumulate_grad)
    before, _asked.gradients = _asked.gradients, dict.fromkeys(wanted) if inputs else None
    try:
        # In this thread, which knows what is asked for.
        with torch.autograd.set_multithreading_enabled(False):
            also = [debt.token for debt in debts]
            allow = allow_unreachable or bool(debts)
            result = _engine(outputs, gradients, keep_graph, create_graph, (*inputs, *also), allow, accumulate_grad)
        found = _asked.gradients
    finally:
        _asked.gradients = before
    if not found:
        return result
    paid = [None if leaf is None else found[id(leaf)] for leaf in leaves]
    if accumulate_grad:
        return _accumulate_all(leaves, paid, create_graph)
    return _together(result[: len(inputs)], paid, allow_unreachable)


def _leaf(given: Tensor | GradientEdge) -> Tensor | None:
    """The leaf that this is, or that this edge leads to."""
    if isinstance(given, GradientEdge):
        return getattr(given.node, "variable", None)
    return given if given.is_leaf else None


def _accumulate_all(leaves: Sequence[Tensor | None], paid: Sequence[Tensor | None], create_graph: bool) -> None:
    due = {id(leaf): (leaf, g) for leaf, g in zip(leaves, paid, strict=True) if leaf is not None and g is not None}
    if due:
        parameters, given = zip(*due.values(), strict=True)
        torch.autograd.backward(parameters, given, create_graph=create_graph)


def _together(
    reached: Sequence[Tensor | None], paid: Sequence[Tensor | None], allow_unused: bool
) -> tuple[Tensor | None, ...]:
    result = []
    for through_graph, besides in zip(reached, paid, strict=True):
        if through_graph is None and besides is None and not allow_unused:
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        result.append(_sum(through_graph, besides))
    return tuple(result)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
