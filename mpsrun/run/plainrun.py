"""A graph as plain PyTorch, on the arguments of a call that the lanes have had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from mpsrun import log
from mpsrun.graph.effects import Effects
from mpsrun.run import names, philox

Generators = Mapping[str, torch.Tensor]
ORDINARY = (torch.Tensor, torch.nn.Parameter, FakeTensor)


class PlainRun:
    """What has to be known of a graph to run it a second time without a trace.

    names, kinds: by argument. written: the arguments whose memory the graph writes. refusal: why it cannot run twice,
    if so. forward: the graph itself.
    """

    def __init__(self, gm: fx.GraphModule, effects: Effects, device: str) -> None:
        facts = effects.facts
        writes = frozenset().union(*(fact.writes for fact in facts.values()))
        returned = frozenset().union(*(facts[node].outputs for node in gm.graph.output_node().all_input_nodes))
        self.device = device
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.names = [names.argument(node) for node in self.placeholders]
        self.kinds = [effects.placeholder_kind[node] for node in self.placeholders]
        self.written = [i for i, node in enumerate(self.placeholders) if facts[node].outputs & writes]
        self.dtypes = {value.dtype for value in effects.values.values() if isinstance(value, torch.Tensor)}
        self.refusal = _refusal(effects, writes)
        self.forward = gm.forward
        self._tied = [i for i, node in enumerate(self.placeholders) if facts[node].outputs & (writes | returned)]

    def copy(self, args: Sequence[Any]) -> list[Any]:
        """Arguments for `run`, as leaves: memory that the graph writes is copied, all else is shared."""
        storages = {storage._cdata: storage for storage in (args[i].untyped_storage() for i in self.written)}
        copies = {key: storage.clone() for key, storage in storages.items()}
        return [_leaf(arg, copies) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def run(self, args: Sequence[Any], start: Generators) -> tuple[Sequence[Any], Generators]:
        """The graph's outputs, and where it leaves the random generators, which are put back."""
        now = generators()
        set_generators(start)
        outputs = self.forward(*args)
        left = generators()
        set_generators(now)
        return outputs, left

    def differentiable(self, args: Sequence[Any]) -> list[int]:
        """The arguments that get gradients; none where the graph writes or hands out the memory of one of them."""
        if not torch.is_grad_enabled():
            return []
        found = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]
        tied = next((i for i in found if i in self._tied), None)
        if tied is not None:
            log.detail(f"not verified: gradients of a network that writes or hands out {self.names[tied]}")
            return []
        return found


def generators() -> Generators:
    """Where the default random generators stand."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found["cuda"] = philox.generator().get_state()
    return found


def set_generators(states: Generators) -> None:
    """Put them where `generators` found them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        philox.generator().set_state(states["cuda"])


def _leaf(arg: torch.Tensor, copies: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    copy = copies.get(arg.untyped_storage()._cdata)
    if copy is None:
        return arg.detach().requires_grad_(arg.requires_grad)
    made = torch.empty(0, dtype=arg.dtype, device=arg.device)
    return made.set_(copy, arg.storage_offset(), arg.shape, arg.stride()).requires_grad_(arg.requires_grad)


def _refusal(effects: Effects, writes: frozenset[int]) -> str | None:
    for node, fact in effects.facts.items():
        if node.op.startswith("call") and _is_collective(node):
            return f"{node.name} speaks to other processes"
        if node.op == "get_attr" and fact.outputs & writes:
            return f"the constant {node.name} is written"
        if node.op == "placeholder" and not _is_ordinary(effects.values[node]):
            return f"{names.argument(node)} is a sparse tensor or of a tensor subclass"
    return None


def _is_collective(node: fx.Node) -> bool:
    home = f"{getattr(node.target, '__module__', '')} {node.target}"
    return "torch.distributed" in home or "c10d" in home


def _is_ordinary(value: object) -> bool:
    """Whether a value is no tensor or one with a storage: of others it is not known when they are written."""
    return not isinstance(value, torch.Tensor) or (type(value) in ORDINARY and value.layout == torch.strided)
