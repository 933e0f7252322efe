"""Whether branches may run at the same time, and which of them may leave the lead."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from mpsrun.errors import NotShippable
from mpsrun.graph.encode import extract
from mpsrun.graph.facts import Effects
from mpsrun.graph.order import Order

Nodes = set[fx.Node]


def place(node: fx.Node, effects: Effects) -> str:
    """The user's line behind a node, or its name."""
    return effects.where(node) or node.name


def conflict(first: Nodes, second: Nodes, effects: Effects) -> str | None:
    """Why one of two branches must wait for the other, or None."""
    for node in sorted(first | second, key=effects.order.__getitem__):
        other = second if node in first else first
        sources = sorted(effects.deps[node] & other, key=effects.order.__getitem__)
        if sources:
            return _conflict_text(sources[0], node, effects)
    return None


def _conflict_text(earlier: fx.Node, later: fx.Node, effects: Effects) -> str:
    before, after = effects.facts[earlier], effects.facts[later]
    if before.writes & (after.reads | after.writes):
        writer, reader, verb = earlier, later, "reads" if before.writes & after.reads else "writes too"
    elif before.reads & after.writes:
        writer, reader, verb = later, earlier, "reads"
    elif earlier in later.all_input_nodes:
        return f"branch at {place(later, effects)} needs a result of its sibling at {place(earlier, effects)}"
    else:
        both = f"{place(earlier, effects)} and {place(later, effects)}"
        return f"branches at {both} both have effects outside tensors"
    return (
        f"branch at {place(writer, effects)} writes a tensor in place that its sibling at "
        f"{place(reader, effects)} {verb}"
    )


def detour(branches: Sequence[Nodes], order: Order[fx.Node], effects: Effects) -> str | None:
    """Why the region as a whole cannot run between its fork and its join, or None."""
    everything = order.mask(node for branch in branches for node in branch)
    outside = order.detours(everything)
    if not outside:
        return None
    node = next(order.members(outside))
    what = "draws random numbers" if effects.facts[node].random else "runs"
    return f"{place(node, effects)} {what} between the branches: one must come before it, another after it"


def outputs_of(branch: Nodes, effects: Effects) -> tuple[fx.Node, ...]:
    """Nodes whose values are used outside the branch, in program order."""
    found = [node for node in branch if any(user not in branch for user in node.users)]
    return tuple(sorted(found, key=effects.order.__getitem__))


def inputs_of(branch: Nodes, effects: Effects) -> tuple[fx.Node, ...]:
    """Nodes outside whose values the branch uses, in program order."""
    found = {source for node in branch for source in node.all_input_nodes if source not in branch}
    return tuple(sorted(found, key=effects.order.__getitem__))


def pinned(branch: Nodes, device: torch.device | None, effects: Effects) -> str | None:
    """Why a branch must stay in the lead, or None."""
    ordered = sorted(branch, key=effects.order.__getitem__)
    for node in ordered:
        reason = _node_reason(node, device, effects)
        if reason is not None:
            return f"{place(node, effects)}: {reason}"
    return (
        _writes_outside(ordered, effects) or _late_writes(branch, effects) or _shared_outputs(branch, effects)
        or _not_shippable(branch, effects)
    )  # fmt: skip


def device_of(branches: Sequence[Nodes], effects: Effects) -> torch.device | None:
    """The device that most nodes of a region work on."""
    devices = Counter(effects.facts[node].device for branch in branches for node in branch)
    del devices[None]
    return devices.most_common(1)[0][0] if devices else None


def _node_reason(node: fx.Node, device: torch.device | None, effects: Effects) -> str | None:
    fact = effects.facts[node]
    if fact.opaque is not None:
        return fact.opaque
    if fact.sync:
        return "waits for a value of the device"
    if fact.device is not None and fact.device != device:
        return f"works on {fact.device}, the rest of the region on {device}"
    if fact.random and fact.device is not None and fact.device.type == "cpu":
        return "random op on the CPU keeps the plain script's order in the lead"
    return None


def _writes_outside(ordered: Sequence[fx.Node], effects: Effects) -> str | None:
    inside = set(ordered)
    own = _made_inside(inside, effects)
    buffers = _buffer_storages(effects)
    for node in ordered:
        if effects.facts[node].writes - own - buffers:
            return f"{place(node, effects)}: writes a tensor in place that was made outside the branch"
    return None


def _made_inside(branch: Nodes, effects: Effects) -> set[int]:
    made = {storage for node in branch for storage in effects.facts[node].outputs}
    taken = {storage for node in inputs_of(branch, effects) for storage in effects.facts[node].outputs}
    return made - taken


def _buffer_storages(effects: Effects) -> set[int]:
    """Memory that belongs to exactly one input, which is a buffer."""
    owners = Counter(s for node in effects.placeholder_kind for s in effects.facts[node].outputs)
    return {
        storage
        for node, kind in effects.placeholder_kind.items()
        if kind == "buffer"
        for storage in effects.facts[node].outputs
        if owners[storage] == 1
    }


def _late_writes(branch: Nodes, effects: Effects) -> str | None:
    """A worker's backward would meet its input as it was, where plain PyTorch may raise or may not care."""
    activations = {
        storage
        for node in inputs_of(branch, effects)
        if effects.placeholder_kind.get(node) not in ("buffer", "constant", "symint")
        for storage in effects.facts[node].outputs
    }
    first = min(effects.order[node] for node in branch)
    for node, fact in effects.facts.items():
        if fact.writes & activations and effects.order[node] > first and node not in branch:
            return f"{place(node, effects)}: writes an input of the branch in place afterwards"
    return None


def _shared_outputs(branch: Nodes, effects: Effects) -> str | None:
    seen = {storage for node in inputs_of(branch, effects) for storage in effects.facts[node].outputs}
    for node in outputs_of(branch, effects):
        if not isinstance(effects.values.get(node), torch.Tensor):
            return f"{place(node, effects)}: hands out a value that is no tensor"
        if seen & effects.facts[node].outputs:
            return f"{place(node, effects)}: an output is a view of an input or of another output"
        seen |= effects.facts[node].outputs
    return None


def _not_shippable(branch: Nodes, effects: Effects) -> str | None:
    try:
        extract(branch, effects, outputs_of(branch, effects))
    except NotShippable as reason:
        return str(reason)
    return None
