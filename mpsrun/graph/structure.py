"""The graph as forks see it: units of real work, with views and parameter arithmetic taken out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from mpsrun.graph.facts import Effects
from mpsrun.graph.order import Order


@dataclass(frozen=True)
class Structure:
    """Units (each named by its first node) that run a kernel on activations, and the data edges among them.

    A unit is a node together with the getitems of its tuple. `before` leads over trivial units (views, sizes)
    to the units of real work behind them. `light` units are one kernel without arithmetic that counts: joins.
    """

    units: Mapping[fx.Node, tuple[fx.Node, ...]]
    before: Mapping[fx.Node, frozenset[fx.Node]]
    order: Order[fx.Node]
    light: frozenset[fx.Node]


def structure_of(gm: fx.GraphModule, effects: Effects) -> Structure:
    """The units of `gm` and their partial order."""
    head = heads(gm, effects)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, first in head.items():
        members.setdefault(first, []).append(node)
    real = {first for first, nodes in members.items() if any(effects.facts[node].kernels for node in nodes)}
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for first, nodes in members.items():  # in program order
        sources = {head[source] for node in nodes for source in node.all_input_nodes if source in head} - {first}
        found: set[fx.Node] = set()
        for source in sources:
            found |= {source} if source in real else before[source]
        before[first] = frozenset(found)
    units = {first: tuple(nodes) for first, nodes in members.items() if first in real}
    order = Order(list(units), {first: before[first] for first in units})
    light = frozenset(first for first in units if _is_light(units[first], effects))
    return Structure(units, {first: before[first] for first in units}, order, light)


def _is_light(nodes: tuple[fx.Node, ...], effects: Effects) -> bool:
    facts = [effects.facts[node] for node in nodes]
    return sum(fact.flops for fact in facts) == 0 and sum(fact.kernels for fact in facts) == 1


def heads(gm: fx.GraphModule, effects: Effects) -> dict[fx.Node, fx.Node]:
    """Each node that works on activations, with the first node of its unit."""
    head: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        fact = effects.facts[node]
        if node.op in ("placeholder", "get_attr", "output") or fact.is_state or fact.floating:
            continue
        if not is_number(effects.values.get(node)):
            source = tuple_source(node, effects)
            head[node] = node if source is None else head.get(source, node)
    return head


def tuple_source(node: fx.Node, effects: Effects) -> fx.Node | None:
    """The node whose tuple of tensors this node takes one from."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    return source if isinstance(effects.values.get(source), (tuple, list)) and not effects.facts[node].kernels else None


def is_number(value: object) -> bool:
    """Sizes and the like: they connect parts of a graph that share no data."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_number(item) for item in value)
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device))
