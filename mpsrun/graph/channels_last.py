"""Which values of a graph may have their channels last in memory, so that tensor cores read them as they are.

A convolution takes its input, and gives its output, with the channels last; ops for which the order in memory makes no
difference keep it. Whatever else reads such a value, and whoever called the graph, gets it as plain PyTorch has it:
views, random masks and strides that are looked at are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx

from mpsrun.graph import ops
from mpsrun.graph.effects import Effects

CONVOLUTIONS = frozenset({"torch.conv2d", "torch.conv_transpose2d"})
# Element by element or channel by channel, on one tensor of images.
KEEPS = frozenset(
    {
        "torch.nn.functional.adaptive_avg_pool2d", "torch.nn.functional.avg_pool2d", "torch.nn.functional.batch_norm",
        "torch.nn.functional.elu", "torch.nn.functional.gelu", "torch.nn.functional.hardsigmoid",
        "torch.nn.functional.hardswish", "torch.nn.functional.hardtanh", "torch.nn.functional.interpolate",
        "torch.nn.functional.leaky_relu", "torch.nn.functional.max_pool2d", "torch.nn.functional.mish",
        "torch.nn.functional.relu", "torch.nn.functional.relu6", "torch.nn.functional.silu", "torch.relu",
        "torch.relu_", "torch.sigmoid", "torch.tanh", "Tensor.relu", "Tensor.relu_", "Tensor.sigmoid", "Tensor.tanh",
    }
)  # fmt: skip
# The same of several tensors: those that are as large are put in the same order.
MEETS = frozenset(
    {
        "operator.add", "operator.iadd", "operator.imul", "operator.mul", "operator.sub", "torch.add", "torch.mul",
        "Tensor.add", "Tensor.add_", "Tensor.mul", "Tensor.mul_",
    }
)  # fmt: skip
JOINS = frozenset({"torch.cat", "torch.concat"})
REDUCED = frozenset({torch.float16, torch.bfloat16})  # in which every convolution uses tensor cores
FLOATING = REDUCED | {torch.float32, torch.float64}


@dataclass(frozen=True)
class ChannelsLast:
    """values: those that may have their channels last. takes: by op that works on them, what it gets like that."""

    values: frozenset[fx.Node]
    takes: Mapping[fx.Node, frozenset[fx.Node]]

    def wanted(self, node: fx.Node, source: fx.Node) -> torch.memory_format | None:
        """How `node` is to get the value of `source`; None: as it is."""
        if node in self.takes:
            return torch.channels_last if source in self.takes[node] else None
        return torch.contiguous_format if source in self.values else None


def what_may(gm: fx.GraphModule, effects: Effects, dtypes: Collection[torch.dtype]) -> ChannelsLast | None:
    """What may have its channels last; None where there is nothing.

    dtypes: in which a convolution gains by it. Memory of which an op would write a copy, or look into one that others
    write, keeps its order.
    """
    kept: frozenset[int] = frozenset()
    while True:
        found = _all_but(gm, effects, dtypes, kept)
        seen = _seen_in_a_copy(found, effects)
        if not seen:
            return found if found.values else None
        kept |= seen


def _all_but(
    gm: fx.GraphModule, effects: Effects, dtypes: Collection[torch.dtype], kept: frozenset[int]
) -> ChannelsLast:
    """What would have its channels last if only values in this memory must not."""
    takes: dict[fx.Node, frozenset[fx.Node]] = {}
    values = set[fx.Node]()
    for node in gm.graph.nodes:
        taken = _taken(node, values, effects, dtypes)
        if taken is not None and not effects.facts[node].outputs & kept:
            takes[node] = taken
            values.add(node)
    return ChannelsLast(frozenset(values), takes)


def _taken(
    node: fx.Node, values: set[fx.Node], effects: Effects, dtypes: Collection[torch.dtype]
) -> frozenset[fx.Node] | None:
    """What an op gets with the channels last, if its result is to have them there."""
    name, result = ops.name_of(node.op, node.target, node.args), effects.values.get(node)
    if name is None or not _is_plain_images(result):
        return None
    if name in CONVOLUTIONS:
        return _of_convolution(node) if result.dtype in dtypes else None
    sources = [source for source in node.all_input_nodes if _is_images(effects.values.get(source))]
    if values.isdisjoint(sources):
        return None
    if name in MEETS or name in JOINS:
        sources = [source for source in sources if name in JOINS or _is_as_large(effects, source, node)]
    elif name not in KEEPS:
        return None
    written = effects.facts[node].writes  # what an op writes stays where it is
    return frozenset(source for source in sources if not effects.facts[source].outputs & written)


def _of_convolution(node: fx.Node) -> frozenset[fx.Node] | None:
    """Its images and its weight."""
    given = [*node.args[:2], *(node.kwargs[key] for key in ("input", "weight") if key in node.kwargs)]
    sources = [source for source in given if isinstance(source, fx.Node)]
    return frozenset(sources) if len(sources) == 2 else None


def _seen_in_a_copy(found: ChannelsLast, effects: Effects) -> frozenset[int]:
    """The memory of which an op that gets a copy in plain order writes that, or hands out what others write."""
    facts = effects.facts
    turned = frozenset[int]().union(*(facts[node].outputs for node in found.values))
    written = frozenset[int]().union(*(fact.writes for fact in facts.values())) & turned
    others = (fact for node, fact in facts.items() if node not in found.takes)
    return frozenset[int]().union(*((fact.writes & turned) | (fact.outputs & written) for fact in others))


def _is_images(value: object) -> TypeGuard[torch.Tensor]:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested:
        return False
    return value.dim() == 4


def _is_plain_images(value: object) -> TypeGuard[torch.Tensor]:
    """Images in the order that PyTorch gives them by itself; of one channel or pixel other strides would do, too."""
    if not _is_images(value):
        return False
    return value.stride() == torch.empty_like(value, memory_format=torch.contiguous_format).stride()


def _is_as_large(effects: Effects, source: fx.Node, node: fx.Node) -> bool:
    mine, its = effects.values[source], effects.values[node]
    return isinstance(mine, torch.Tensor) and isinstance(its, torch.Tensor) and mine.shape == its.shape
