"""One run of a graph on fake tensors, which records what each node does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mpsrun.errors import first_line
from mpsrun.graph import ops
from mpsrun.graph.encode import encodable
from mpsrun.graph.facts import NodeFacts
from mpsrun.graph.state import State, Tracker, applied, is_state_node
from mpsrun.graph.watch import Watch, tensors

# Higher-order ops that run their first argument, a graph of its own, on the other ones.
CALLS_ITS_GRAPH = frozenset({"wrap", "tag_activation_checkpoint", "wrap_activation_checkpoint"})
PLAIN = (type(None), bool, int, float, complex, str, torch.SymInt, torch.dtype, torch.device, torch.Size)


class FakeRun:
    """Runs a graph node by node; `facts`, `kinds` and `env` (the fake values) are what comes of it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.facts: dict[fx.Node, NodeFacts] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.env: dict[fx.Node, Any] = {}
        self._mode = _fake_mode(gm)
        self._transformed = any(map(_is_transform, gm.graph.nodes))
        self._storages = Storages()
        self._tracker = Tracker()

    def run(self) -> None:
        """Visit every node in program order."""
        visit = {"placeholder": self._placeholder, "get_attr": self._get_attr, "output": self._output}
        with _quiet_shapes(self._mode):
            for node in self.gm.graph.nodes:
                visit.get(node.op, self._call)(node)

    def _placeholder(self, node: fx.Node) -> None:
        example = node.meta.get("example_value")
        self.kinds[node] = kind = _kind(node, example)
        # A second tensor on the same storage, so that Dynamo's own keeps its shape and version.
        value = self._alias(example) if isinstance(example, torch.Tensor) else example
        self._note_source(node, value, floating=kind != "input")

    def _get_attr(self, node: fx.Node) -> None:
        value = _attribute(self.gm, str(node.target))
        self.kinds[node] = "constant"
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            value = self._mode.from_tensor(value)
        node.meta.setdefault("example_value", value)
        self._note_source(node, value, floating=True)

    def _note_source(self, node: fx.Node, value: Any, floating: bool) -> None:
        self.env[node] = value
        self.facts[node] = NodeFacts(
            outputs=self._storages.of(value), floating=floating, device=_device(tensors(value))
        )

    def _output(self, node: fx.Node) -> None:
        reads = frozenset().union(*(self.facts[source].outputs for source in node.all_input_nodes))
        self.facts[node] = NodeFacts(reads=reads)

    def _call(self, node: fx.Node) -> None:
        if is_state_node(node):
            self._tracker.step(node)
            self.facts[node] = NodeFacts(is_state=True, floating=True)
            return
        if self._transformed:
            self._skip(node)
            return
        number = self._wrapped_number(node)
        if number is not None:
            self.env[node] = node.meta.get("example_value")
            self.facts[node] = NodeFacts(opaque=number, floating=True, state=self._tracker.now)
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        taken = tensors((args, kwargs))
        self.facts[node] = self._facts(node, args, kwargs, taken)

    def _skip(self, node: fx.Node) -> None:
        """Tensors of torch.func wrap others and mean nothing outside their transform: none of it is run."""
        self.env[node] = value = node.meta.get("example_value")
        reason = "the network uses torch.func transforms (vmap, grad, jvp)"
        self.facts[node] = NodeFacts(
            opaque=reason, unknown=True, barrier=not tensors(value), kernels=1, state=self._tracker.now
        )

    def _facts(self, node: fx.Node, args: Any, kwargs: Any, taken: list[torch.Tensor]) -> NodeFacts:
        watch = Watch(self._storages.known)
        before = self._storages.versions(taken)
        failed = self._evaluate(node, args, kwargs, watch)
        value = self.env[node]
        given = self._storages.of((args, kwargs)) if taken else frozenset()
        outputs = self._storages.of(value)
        bumped = self._storages.bumped(before)
        writes = given & (watch.writes | bumped) if failed is None else given
        produced = tensors(value)
        return NodeFacts(
            reads=given if produced or failed or watch.kernels or watch.sync else frozenset(),
            writes=frozenset(writes),
            hidden_writes=frozenset(writes - bumped) if failed is None else frozenset(),
            outputs=outputs,
            state=self._tracker.now,
            random=watch.random,
            sync=watch.sync,
            opaque=_opaque(node, value, [*taken, *produced]) or ("has a sparse gradient" if watch.sparse else failed),
            unknown=failed is not None or _is_higher_order(node),
            barrier=not taken and not produced and ops.name_of(node.op, node.target, node.args) is None,
            flops=watch.flops,
            bytes_moved=watch.bytes_moved,
            kernels=watch.kernels,
            floating=all(self.facts[source].floating for source in node.all_input_nodes),
            device=_device(produced or taken),
        )

    def _evaluate(self, node: fx.Node, args: Any, kwargs: Any, watch: Watch) -> str | None:
        """Put the node's value into `env`; returns why it could not be computed, if so."""
        self.env[node] = node.meta.get("example_value")
        call = self._callable(node, args)
        if call is None:
            return f"{ops.describe(node.target)} cannot be looked into"
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(applied(_autocast_only(self._tracker.now)))
                stack.enter_context(self._mode)
                stack.enter_context(watch)
                self.env[node] = call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  any op may fail on fake tensors; it then stays in the lead
            return f"{ops.describe(node.target)} did not run on fake tensors ({first_line(error)[:120]})"
        return None

    def _callable(self, node: fx.Node, args: Any) -> Callable[..., Any] | None:
        if node.op == "call_method":
            return lambda first, *rest, **kwargs: getattr(first, str(node.target))(*rest, **kwargs)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))
        if _is_higher_order(node):
            body = args[0] if args else None
            if getattr(node.target, "__name__", "") in CALLS_ITS_GRAPH and isinstance(body, fx.GraphModule):
                return lambda graph, *rest, **_: graph(*rest)
            return None
        return node.target if callable(node.target) else None

    def _wrapped_number(self, node: fx.Node) -> str | None:
        """Dynamo passes a changing float as a tensor on the CPU; reading it is no wait for a device."""
        source = node.args[0] if node.args else None
        if node.op != "call_method" or node.target != "item" or not isinstance(source, fx.Node):
            return None
        if source.op == "placeholder" and self.kinds[source] == "constant":
            return f"takes a number ({source.name}) that changes between calls"
        return None

    def _alias(self, example: torch.Tensor) -> torch.Tensor:
        with self._mode, torch.no_grad():
            return example.data


class Storages:
    """Numbers for storages, which are kept alive so that no address is met twice."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._first: dict[int, torch.Tensor] = {}  # its counter is the one that autograd looks at

    def of(self, value: Any) -> frozenset[int]:
        """Numbers of the storages in a node's value; new ones get a number."""
        return frozenset(number for tensor in tensors(value) for number in self._number(tensor))

    def known(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage, or None for a temporary inside an op."""
        address = _address(tensor)
        return None if address is None else self._numbers.get(address)

    def versions(self, given: list[torch.Tensor]) -> dict[int, int]:
        """Version counters by storage, each of the first tensor seen on it."""
        numbers = {number for tensor in given if (number := self.known(tensor)) is not None}
        return {number: _version(self._first[number]) for number in numbers}

    def bumped(self, before: dict[int, int]) -> set[int]:
        """Storages whose counter has moved since `before`."""
        return {number for number, version in before.items() if _version(self._first[number]) != version}

    def _number(self, tensor: torch.Tensor) -> Iterator[int]:
        address = _address(tensor)
        if address is None:
            return
        if address not in self._numbers:
            self._numbers[address] = len(self._numbers)
            self._first[self._numbers[address]] = tensor
        yield self._numbers[address]


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrapper subclasses have none
        return None


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _kind(node: fx.Node, example: Any) -> str:
    if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)):
        return "symint"
    described = node.meta.get("tensor_dict")
    if isinstance(example, torch.nn.Parameter):
        return "parameter"
    if described is None:
        return "constant" if _is_wrapped_number(example) else "input"
    if described.get("_dynamo_static_input_type") is None:
        return "input"
    return "parameter" if example.requires_grad else "buffer"


def _is_wrapped_number(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.dim() == 0 and example.dtype == torch.float64


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    found: Any = gm
    for name in target.split("."):
        found = getattr(found, name)
    return found


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    for node in gm.graph.nodes:
        for value in tensors(node.meta.get("example_value")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _quiet_shapes(mode: FakeTensorMode) -> Iterator[None]:
    """Whatever is asked about symbolic sizes here becomes no guard of the user's graph."""
    environment = mode.shape_env
    with ExitStack() as stack:
        if environment is not None:
            stack.enter_context(environment.suppress_guards())
            stack.enter_context(environment.ignore_fresh_unbacked_symbols())
        yield


def _autocast_only(state: State | None) -> State | None:
    """Autocast decides about dtypes; grad and inference mode change nothing that is looked for."""
    return None if state is None else State(autocast=state.autocast, cache=False if state.autocast else None)


def _is_transform(node: fx.Node) -> bool:
    home = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and "functorch" in home


def _is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _device(found: list[torch.Tensor]) -> torch.device | None:
    return found[0].device if found else None


def _opaque(node: fx.Node, value: Any, touched: list[torch.Tensor]) -> str | None:
    """Why a node cannot leave the lead, in words."""
    if _is_higher_order(node):
        return f"{node.target.__name__} holds a graph of its own"  # type: ignore[union-attr]
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"custom op {node.target}"
    for tensor in touched:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            return f"works on a {str(tensor.layout).removeprefix('torch.')} or nested tensor"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            return f"works on a tensor subclass ({type(tensor).__name__})"
    devices = sorted({str(tensor.device) for tensor in touched})
    if len(devices) > 1:
        return f"works on more than one device ({', '.join(devices)})"
    return encodable(node) or _foreign_value(value)


def _foreign_value(value: Any) -> str | None:
    if isinstance(value, (torch.Tensor, *PLAIN)):
        return None
    if isinstance(value, (list, tuple)):
        return next((reason for item in value if (reason := _foreign_value(item))), None)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return "computes with a number that changes between calls"
    return f"gives a {type(value).__name__}, which is no tensor"
