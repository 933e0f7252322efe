"""A look at every aten op that one node dispatches: what it writes, whether it is random, what it costs."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

# Ops whose randomness is switched off by an argument; others with the tag are always random.
MAYBE_RANDOM = ("dropout", "attention", "lstm", "gru", "rnn", "rrelu")
# Values such as tensor sizes that are fake and not known are costed as this.
UNKNOWN_SIZE = 64
NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "sym_size"})
# Statistics that these ops write in place are declared in no schema; the flag says whether they do.
STATISTICS = ("running_mean", "running_var")
TRAINING = ("training", "train", "use_input_stats")
SPARSE = ("sparse", "sparse_grad")
ALWAYS_WRITE_STATISTICS = ("batch_norm_gather_stats", "batch_norm_update_stats")


def hint(value: Any) -> int:
    """A plain int for a size that may be symbolic; for costs only, and without a guard."""
    if isinstance(value, torch.SymInt):
        try:
            found = value.node.hint
        except (AttributeError, RuntimeError, TypeError):
            found = None
        return int(found) if isinstance(found, int) else UNKNOWN_SIZE
    return int(value)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def size_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    count = 1
    for size in tensor.shape:
        count *= hint(size)
    return count * tensor.element_size()


class Watch(TorchDispatchMode):
    """Collects what the ops dispatched under it do; `storage_of` names storages that matter."""

    def __init__(self, storage_of: Callable[[torch.Tensor], int | None]) -> None:
        super().__init__()
        self._storage_of = storage_of
        self.writes: set[int] = set()
        self.random = False
        self.sparse = False  # the gradient of an argument is sparse
        self.sync = False
        self.flops = 0
        self.bytes_moved = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = dict(_named_arguments(func, args, kwargs))
        self.writes.update(self._storages(_written(func, named)))
        self.random |= _is_random(func, named)
        self.sync |= _is_sync(func)
        self.sparse |= any(named.get(flag) is True for flag in SPARSE)
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _storages(self, found: Iterable[torch.Tensor]) -> Iterator[int]:
        for tensor in found:
            storage = self._storage_of(tensor)
            if storage is not None:
                yield storage

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func.overloadpacket
        if _is_view(func) or packet.__name__ in NO_KERNEL or not tensors(result):
            return
        self.kernels += 1
        self.bytes_moved += sum(map(size_bytes, tensors((args, kwargs, result))))
        try:
            self.flops += hint(_flops(packet, args, kwargs, result))
        except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError):
            self.flops += 0  # an estimate misses an op rather than failing the step


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Floating-point operations of one op; 0 where only its bytes count."""
    formula = flop_registry.get(packet)
    if formula is not None:
        return formula(*args, **kwargs, out_val=result)
    name = packet.__name__
    if "scaled_dot_product" in name:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if "rnn" in name:
        steps, weights = (
            args[0].shape[:-1].numel(),
            [tensor for tensor in tensors(args[1:]) if tensor.dim() == 2],
        )
        return 2 * steps * sum(weight.numel() for weight in weights)
    return 0


def _named_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    declared = func._schema.arguments
    yield from ((argument.name, value) for argument, value in zip(declared, args, strict=False))
    yield from kwargs.items()
    given = {argument.name for argument, _ in zip(declared, args, strict=False)} | set(kwargs)
    for argument in declared:
        if argument.name not in given and argument.has_default_value():
            yield argument.name, argument.default_value


def _written(func: Any, named: dict[str, Any]) -> list[torch.Tensor]:
    found = [
        named[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
    ]
    name = func.overloadpacket.__name__
    if any(named.get(flag) is True for flag in TRAINING) or name.startswith(ALWAYS_WRITE_STATISTICS):
        found.extend(named[key] for key in STATISTICS if key in named)
    return tensors(found)


def _is_random(func: Any, named: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    if not any(word in func.overloadpacket.__name__ for word in MAYBE_RANDOM):
        return True
    chances = [named[key] for key in ("p", "dropout_p", "dropout") if key in named]
    off = any(isinstance(chance, (int, float)) and chance == 0 for chance in chances)
    return not off and not any(named.get(flag) is False for flag in TRAINING)


def _is_sync(func: Any) -> bool:
    """Whether the CPU waits for the device, to learn a value or a shape that depends on data."""
    data_dependent = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(data_dependent & set(func.tags)) or func.overloadpacket.__name__ == "_local_scalar_dense"


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
