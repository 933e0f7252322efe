"""Which convolutions have a weight to themselves, so that its gradient need not meet another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mpsrun.graph.facts import Effects


def own_weights(gm: fx.GraphModule, effects: Effects) -> Mapping[fx.Node, fx.Node]:
    """By convolution of images its weight, where nothing else reads that or the bias, which are both parameters.

    Another gradient of theirs, or an op that made one, would have to wait for the one of this convolution.
    """
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.conv2d):
        weight, bias = _given(node, 1, "weight"), _given(node, 2, "bias")
        if (
            _is_own(weight, node, effects)
            and _wants_gradient(weight)
            and (bias is None or _is_own(bias, node, effects))
        ):
            found[node] = weight
    return found


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _is_own(parameter: Any, node: fx.Node, effects: Effects) -> bool:
    uses = sum(given is parameter for given in (*node.args, *node.kwargs.values()))
    return effects.placeholder_kind.get(parameter) == "parameter" and len(parameter.users) == uses == 1


def _wants_gradient(parameter: fx.Node) -> bool:
    return bool(getattr(parameter.meta.get("example_value"), "requires_grad", False))
