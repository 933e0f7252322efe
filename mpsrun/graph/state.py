"""The thread-wide state a node runs under (grad, inference and autocast modes), as data."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch
from torch import fx

AUTOCAST_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
AUTOCAST_DEVICES = frozenset({"cpu", "cuda"})


class Autocast(msgspec.Struct, frozen=True):
    """Autocast of one device type; `dtype` is a name such as "bfloat16"."""

    device: str
    enabled: bool
    dtype: str


class State(msgspec.Struct, frozen=True):
    """What a graph sets explicitly; a field that is None (or a device not named) is as it was on entry."""

    grad: bool | None = None
    inference: bool | None = None
    autocast: tuple[Autocast, ...] = ()
    cache: bool | None = None


def check(state: State) -> None:
    """Raise ValueError where `state` names an unknown device type or dtype, or a device twice."""
    devices = [autocast.device for autocast in state.autocast]
    if len(devices) != len(set(devices)) or not AUTOCAST_DEVICES.issuperset(devices):
        raise ValueError(f"autocast state: expected each of {sorted(AUTOCAST_DEVICES)} once, found {devices}")
    for autocast in state.autocast:
        if autocast.dtype not in AUTOCAST_DTYPES:
            raise ValueError(f"autocast dtype: expected one of {sorted(AUTOCAST_DTYPES)}, found {autocast.dtype}")


@contextmanager
def applied(state: State | None) -> Iterator[None]:
    """Run the body under `state` and restore what was before, also when the body raises."""
    if state is None:
        yield
        return
    with ExitStack() as stack:
        if state.inference is not None:
            stack.enter_context(torch.inference_mode(state.inference))
        if state.grad is not None:
            stack.enter_context(torch.set_grad_enabled(state.grad))
        for autocast in state.autocast:
            dtype = AUTOCAST_DTYPES[autocast.dtype]
            stack.enter_context(
                torch.autocast(autocast.device, dtype=dtype, enabled=autocast.enabled, cache_enabled=state.cache)
            )
        yield


def is_state_node(node: fx.Node) -> bool:
    """Whether `node` does nothing but change the state that the nodes after it run under."""
    return node.op == "call_function" and node.target in _transitions()


class Tracker:
    """Follows the state through a graph in program order; `now` is None where it is as on entry."""

    def __init__(self) -> None:
        self.now: State | None = None
        self._before: dict[fx.Node, State] = {}

    def step(self, node: fx.Node) -> None:
        """Take the change that one state node makes."""
        current = self.now or State()
        self._before[node] = current
        token = node.args[0] if node.args else None
        entered = self._before.get(token, current) if isinstance(token, fx.Node) else current
        changed = _transitions()[node.target](current, entered, node)
        self.now = None if changed == State() else changed


def _set_grad(current: State, _entered: State, node: fx.Node) -> State:
    return msgspec.structs.replace(current, grad=bool(node.args[0]))


def _enter_autocast(current: State, _entered: State, node: fx.Node) -> State:
    given = dict(zip(("device", "dtype", "enabled", "cache"), node.args, strict=False))
    device = str(given["device"])
    dtype: Any = given.get("dtype") or torch.get_autocast_dtype(device)
    entry = Autocast(device, bool(given.get("enabled", True)), str(dtype).removeprefix("torch."))
    others = tuple(autocast for autocast in current.autocast if autocast.device != device)
    cache = given.get("cache")
    if cache is None:
        cache = current.cache
    return msgspec.structs.replace(current, autocast=(*others, entry), cache=None if cache is None else bool(cache))


def _enter_inference(current: State, _entered: State, node: fx.Node) -> State:
    enabled = bool(node.args[0]) if node.args else True
    # torch.inference_mode(False) turns grad mode on, torch.inference_mode(True) off.
    return msgspec.structs.replace(current, inference=enabled, grad=None)


def _exit_autocast(current: State, entered: State, _node: fx.Node) -> State:
    return msgspec.structs.replace(current, autocast=entered.autocast, cache=entered.cache)


def _exit_inference(current: State, entered: State, _node: fx.Node) -> State:
    return msgspec.structs.replace(current, inference=entered.inference, grad=entered.grad)


def _transitions() -> dict[Any, Any]:
    return {
        torch._C._set_grad_enabled: _set_grad,
        torch.amp.autocast_mode._enter_autocast: _enter_autocast,
        torch.amp.autocast_mode._exit_autocast: _exit_autocast,
        torch.autograd.grad_mode._enter_inference_mode: _enter_inference,
        torch.autograd.grad_mode._exit_inference_mode: _exit_inference,
    }
