"""A region computed in the lead as plain PyTorch does it: where a worker is missing, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mpsrun.graph.program import build
from mpsrun.graph.state import applied
from mpsrun.run import philox
from mpsrun.run.crossing import Crossing, Invocation, Share
from mpsrun.wire import messages as m


@dataclass(eq=False)
class Here:
    """An execution in the lead."""

    outputs: tuple[torch.Tensor, ...]
    random_start: int


def compute(crossing: Crossing, args: tuple[Any, ...]) -> Here:
    """What the workers would have computed, as plain PyTorch does it."""
    rngs, start = philox.reserve(crossing)
    outputs: list[torch.Tensor] = []
    for share, rng in zip(crossing.shares, rngs or [None] * len(crossing.shares), strict=True):
        with philox.replayed(rng) as seek:
            outputs += build(share.program, seek=seek)(*(args[i] for i in share.args))
    return Here(tuple(outputs), start)


def differentiate(invocation: Invocation) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, or many at once under vmap: the lead computes as plain PyTorch."""
    crossing, args = invocation.crossing, invocation.args
    gradients, invocation.gradients, forward = invocation.gradients, None, invocation.forward
    if gradients is None or args is None or forward is None:
        raise RuntimeError("mpsrun: a Fork without the gradients of its Join")
    found: dict[int, torch.Tensor] = {}
    for share in crossing.shares:
        pairs = _differentiate(share, args, gradients, forward.message)
        for arg, gradient in pairs:
            found[arg] = gradient if arg not in found else found[arg] + gradient
    return [found.get(arg) for arg in crossing.wanted]


def _differentiate(
    share: Share,
    args: Sequence[Any],
    gradients: Sequence[torch.Tensor | None],
    message: m.Forward,
) -> list[tuple[int, torch.Tensor]]:
    present = [i for i, o in enumerate(share.outputs) if gradients[o] is not None]
    if not present:
        return []
    values = [args[arg] for arg in share.args]
    for index in share.program.writes:
        values[index] = values[index].clone()
    rng = message.rngs[share.layout.position] if message.rngs else None
    # Forward happened outside of whatever transform backward is under.
    with temporarily_clear_interpreter_stack(), philox.replayed(rng) as seek, applied(message.state):
        outputs = build(share.program, seek=seek)(*values)
    reached = share.gradients.reached(present)
    results = torch.autograd.grad(
        [outputs[i] for i in present],
        [values[i] for i in reached],
        [gradients[share.outputs[i]] for i in present],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return [(share.args[i], g) for i, g in zip(reached, results, strict=True) if g is not None]
