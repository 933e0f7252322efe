"""Gradients that go to parameters without a node of autograd's for each of them.

After the backward of a Function, autograd visits an AccumulateGrad for each of its parameters, which takes longer than
all else that is left to do for a small captured step. So a call may leave its parameters out of the graph, with a token
in their place. All that a script does with autograd from Python comes through `_run_backward`, where what calls owe to
their parameters is paid once autograd is through:

    backward()                          as AccumulateGrad would: set, or added to what is there
    grad(y, parameters)                 the token is asked for as well, and what calls owe is added to the result
    backward(inputs=parameters)         likewise, and then accumulated
    grad or backward for other tensors  does not reach the token, so that nothing is owed

Whoever enters autograd's engine in another way has each call pay by itself. Autograd has nodes as ever for parameters
with hooks, under `torch.distributed`, which hooks the nodes, and where the script holds the node of a parameter when a
network is recorded, which is how to keep a hook on it.

What differs: gradients are there when `backward()` returns, not yet in a hook that is called in the middle of it, and
until then all of them are in memory beside those that they are added to. A hook that is set between forward and
backward is called, but what is owed to its parameter and what comes through the graph are two parts then, each at its
own time. While a debt is open, all backwards come in the thread that calls them.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_backward_hooks = operator.attrgetter("_backward_hooks")
_accumulate_hooks = operator.attrgetter("_post_accumulate_grad_hooks")
_is_leaf = operator.attrgetter("is_leaf")
_requires_grad = operator.attrgetter("requires_grad")
_tokens: dict[torch.device, Tensor] = {}
_debts: weakref.WeakSet[Debt] = weakref.WeakSet()
_lock = threading.Lock()  # of the debts


class Debt:
    """One call's to its parameters.

    token: a leaf, what the call has in its graph in the place of them.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        device = parameters[0].device
        if device not in _tokens:
            _tokens[device] = torch.empty(0, device=device)
        self.token = _tokens[device].detach().requires_grad_()  # as old as the call: its node is of the call's stream
        with _lock:
            _debts.add(self)

    def pay(self, ctx: Any, gradients: Sequence[Tensor | None], are_alike: bool) -> None:
        """In backward: here are the gradients.

        ctx: of the Function whose first tensor is the token. are_alike: whether each is laid out like its parameter, in
        memory that nobody else has. Raises RuntimeError where anomalies are to be detected and one is not a number.
        """
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            _check(gradients, ctx)
        token = ctx.next_functions[0][0]
        payment = Payment(self.parameters, gradients, are_alike, _stream(self.token))
        if _asked.payments is None:
            if torch._C._will_engine_execute_node(token):
                _accumulate([payment], None, torch.is_grad_enabled())
        elif _is_asked_for(token):
            _asked.payments.append(payment)


class Payment(NamedTuple):
    """Gradients of parameters, and the stream that computes them; see `Debt.pay`."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    are_alike: bool
    stream: torch.cuda.Stream | None


def may_owe(parameters: Sequence[Tensor]) -> bool:
    """Whether a call may leave these out of the graph."""
    if not parameters or _has_hooks(parameters):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return all(map(_is_leaf, parameters))


def nodes_are_held(parameters: Sequence[Tensor]) -> bool:
    """Whether the script has autograd's node of one of these."""
    return any(p.is_leaf and _references_to_node(p) > _NO_OTHERS for p in parameters)


def _graph_of(leaf: Tensor) -> Any:
    with torch.enable_grad():
        return leaf.view_as(leaf).grad_fn


def _references_to_node(leaf: Tensor) -> int:
    """To the one Python object that the node has; a graph that has the node, such as this one, may count as one."""
    graph = _graph_of(leaf)
    return sys.getrefcount(graph.next_functions[0][0])


with torch.inference_mode(False):  # wherever this is imported
    _leaf_of_nobody = torch.zeros((), device="cpu", requires_grad=True)
    _NO_OTHERS = _references_to_node(_leaf_of_nobody)
    _Node: Any = type(_graph_of(_leaf_of_nobody).next_functions[0][0])


def _grad_dtype(leaf: Tensor) -> torch.dtype:
    """What its gradient is to have."""
    wanted: torch.dtype | None = getattr(leaf, "grad_dtype", None)
    return wanted or leaf.dtype


def laid_out_alike(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether AccumulateGrad takes this for the parameter's gradient as it is, if it has none yet."""
    if gradient.layout is not torch.strided or gradient.dtype != parameter.dtype:
        return False
    return gradient.stride() == parameter.stride()


def _is_asked_for(token: Any) -> bool:
    """Whether the backward that runs now accumulates, or was asked for this node."""
    try:
        return bool(torch._C._will_engine_execute_node(token))
    except RuntimeError:  # what torch says of a leaf that was asked for
        return True


def _check(gradients: Sequence[Tensor | None], ctx: Any) -> None:
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.isnan().any():
            raise RuntimeError(f"Function '{type(ctx).__name__}' returned nan values in its {i}th output.")


def _has_hooks(parameters: Sequence[Tensor]) -> bool:
    return any(map(_backward_hooks, parameters)) or any(map(_accumulate_hooks, parameters))


def _stream(near: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(near.device) if near.is_cuda else None


# ---- what the script asks for


class _Asked(threading.local):
    """payments: those to the backward that this thread is in, if it came through here."""

    payments: list[Payment] | None = None


_asked = _Asked()
_engine = torch.autograd.graph._engine_run_backward


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
    if not _debts and _asked.payments is None:
        return _engine(outputs, gradients, keep_graph, create_graph, inputs, allow_unreachable, accumulate_grad)
    leaves = [_leaf(given) for given in inputs]
    wanted = {id(leaf) for leaf in leaves if leaf is not None} if inputs else None
    tokens = [debt.token for debt in _owed_to(wanted)] if wanted else []
    before, _asked.payments = _asked.payments, []
    try:
        with torch.autograd.set_multithreading_enabled(False):  # in this thread, where payments arrive
            result: Any = _engine(
                outputs,
                gradients,
                keep_graph,
                create_graph,
                (*inputs, *tokens),
                allow_unreachable or bool(tokens),
                accumulate_grad,
            )
        payments = _asked.payments
    finally:
        _asked.payments = before
    _wait_for(payments)
    if wanted is None or accumulate_grad:
        _accumulate(payments, wanted, create_graph)
    else:
        owed = _totals(payments, wanted, create_graph)
        result = _answer(leaves, result[: len(leaves)], owed, create_graph, allow_unreachable)
    _let_go(payments)
    return result


# Once, when this is imported: whoever wraps it after that stays, and is not lost.
torch.autograd._engine_run_backward = _run_backward  # type: ignore[assignment]
torch.autograd.graph._engine_run_backward = _run_backward  # type: ignore[assignment]


def _leaf(given: Tensor | GradientEdge) -> Tensor | None:
    """The leaf that this is, or that this edge leads to."""
    if isinstance(given, GradientEdge):
        node: Any = given.node
        return node.variable if type(node) is _Node else None
    return given if given.is_leaf else None


def _owed_to(wanted: Collection[int]) -> list[Debt]:
    """The debts to parameters with these ids."""
    with _lock:
        debts = [*_debts]
    return [debt for debt in debts if any(id(parameter) in wanted for parameter in debt.parameters)]


def _accumulate(payments: Sequence[Payment], wanted: Collection[int] | None, create_graph: bool) -> None:
    """Do as AccumulateGrad would; wanted: the ids of those that get something, if not all."""
    left = payments
    if wanted is None and not create_graph and all(map(_are_plain, payments)):
        with torch.no_grad():
            left = [payment._replace(gradients=_hand_over(payment)) for payment in payments]
    if due := _totals(left, wanted, create_graph):
        parameters, gradients = zip(*due.values(), strict=True)
        _engine(parameters, gradients, create_graph, create_graph, (), True, True)


def _are_plain(payment: Payment) -> bool:
    """Whether these gradients, and nothing else, go to parameters that do nothing with them."""
    parameters = payment.parameters
    if not payment.are_alike or _has_hooks(parameters) or not all(map(_requires_grad, parameters)):
        return False
    return len({*map(id, parameters)}) == len(parameters)


def _hand_over(payment: Payment) -> list[Tensor | None]:
    """Set gradients, or add to them; returns those that only autograd can, with None in the place of the others."""
    odd: list[Tensor | None] = [None] * len(payment.parameters)
    sums, addends = [], []
    for i, (parameter, gradient) in enumerate(zip(payment.parameters, payment.gradients, strict=True)):
        if gradient is None:
            continue
        present = parameter.grad
        if present is None:
            try:
                parameter.grad = gradient
            except RuntimeError:  # its gradient is to have another dtype, say
                odd[i] = gradient
        elif present.layout is torch.strided:
            sums.append(present)
            addends.append(gradient)
        else:
            odd[i] = gradient
    if len({present.data_ptr() for present in sums}) < len(sums):  # some share it
        for present, addend in zip(sums, addends, strict=True):
            present.add_(addend)
    elif sums:
        torch._foreach_add_(sums, addends)
    return odd


def _totals(
    payments: Sequence[Payment], wanted: Collection[int] | None, create_graph: bool
) -> dict[int, tuple[Tensor, Tensor]]:
    """Parameters that still require a gradient, with the sum of what they get, by their ids."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.set_grad_enabled(create_graph):
        for payment in payments:
            for p, gradient in zip(payment.parameters, payment.gradients, strict=True):
                if gradient is not None and p.requires_grad and (wanted is None or id(p) in wanted):
                    found[id(p)] = p, found[id(p)][1] + gradient if id(p) in found else gradient
    return found


def _wait_for(payments: Sequence[Payment]) -> None:
    """Have the stream of this thread wait until the gradients are there."""
    for here, stream in _elsewhere(payments):
        here.wait_stream(stream)


def _let_go(payments: Sequence[Payment]) -> None:
    """Have what uses the gradients' memory next, on their streams, wait for what this thread does with them."""
    for here, stream in _elsewhere(payments):
        stream.wait_stream(here)


def _elsewhere(payments: Sequence[Payment]) -> Iterator[tuple[torch.cuda.Stream, torch.cuda.Stream]]:
    """The stream of this thread, and that of each payment, where they are not the same."""
    for payment in payments:
        here = _stream(payment.parameters[0])
        if here is not None and payment.stream is not None and payment.stream != here:
            yield here, payment.stream


def _answer(
    leaves: Sequence[Tensor | None],
    reached: Sequence[Tensor | None],
    owed: Mapping[int, tuple[Tensor, Tensor]],
    create_graph: bool,
    allow_unused: bool,
) -> tuple[Tensor | None, ...]:
    """What is reached through the graph, and what is owed besides, as the hooks of these leaves leave it."""
    result: list[Tensor | None] = []
    for leaf, through_graph in zip(leaves, reached, strict=True):
        also = owed[id(leaf)][1] if leaf is not None and id(leaf) in owed else None
        if leaf is not None and also is not None and (leaf._backward_hooks or _grad_dtype(leaf) != also.dtype):
            (also,) = _engine((leaf,), (also,), create_graph, create_graph, (leaf,), False, False)
        if through_graph is None and also is None and not allow_unused:
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        if through_graph is not None and also is not None:
            with torch.set_grad_enabled(create_graph):
                result.append(through_graph + also)
        else:
            result.append(also if through_graph is None else through_graph)
    return tuple(result)
