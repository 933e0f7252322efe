"""Which convolutions have a weight to themselves, so that its gradient need not meet another one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from mpsrun.graph.facts import Effects


def own_weights(gm: fx.GraphModule, effects: Effects) -> Mapping[fx.Node, fx.Node]:
    """By convolution of images its weight, where that is a parameter that nothing else in the graph reads."""
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.conv2d):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if effects.placeholder_kind.get(weight) == "parameter" and len(weight.users) == 1:
            found[node] = weight
    return found
