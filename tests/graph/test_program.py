"""Branches as data: there and back, and what is refused."""

import math
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from nets import Captured, ConvNormRelu, capture
from networks import why_not_here
from torch import Tensor, nn

from mpsrun.errors import NotShippable
from mpsrun.graph import ops
from mpsrun.graph.program import (
    Autocast,
    Input,
    Map,
    Named,
    Op,
    Program,
    Ref,
    Seq,
    State,
    build,
    extract,
    validate,
)  # fmt: skip


def whole(captured: Captured) -> tuple[Program, list[torch.fx.Node]]:
    """The whole graph as one program."""
    nodes = [node for node in captured.gm.graph.nodes if node.op.startswith("call_")]
    nodes = [node for node in nodes if not captured.effects.facts[node].is_state]
    (output,) = captured.gm.graph.find_nodes(op="output")
    return extract(nodes, captured.effects, output.args[0])


def there_and_back(program: Program) -> Program:
    data = msgspec.msgpack.encode(program)
    decoded = msgspec.msgpack.decode(data, type=Program)
    assert decoded == program or any(map(math.isnan, floats(program)))
    validate(decoded)
    return decoded


def floats(program: Program) -> list[float]:
    return [arg for op in program.nodes for arg in op.args if isinstance(arg, float)]


def arguments(captured: Captured, sources: list[torch.fx.Node]) -> list[Any]:
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, captured.inputs, strict=True))
    return [values[node] if node in values else getattr(captured.gm, str(node.target)) for node in sources]


class Mixed(nn.Module):
    """Ops of every kind of name, arguments of every kind of type."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y, (h, _) = self.lstm(x)
        y = torch.cat([y, self.embedding(index)], dim=1)[:, ::2, ...]
        y = y.masked_fill(y > 10, float("-inf")).clamp(min=-1e3)
        y = torch.einsum("bij,bj->bi", y, h[0]) ** 2
        z = F.interpolate(x.unsqueeze(1), scale_factor=2.0, mode="nearest").to(torch.float64)
        with torch.no_grad():
            weight = x.std(unbiased=False)
        q, k = self.norm(x).mT.chunk(2, dim=1)
        return y.sum() + z.sum() * weight + F.gelu(q @ k.mT, approximate="tanh").sum() + x.new_ones(2).sum()


def test_round_trip_gives_the_same_values_and_gradients() -> None:
    if reason := why_not_here("recurrent"):
        pytest.skip(reason)
    model = Mixed()
    x, index = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[1, 2], [3, 0]])
    captured = capture(model, x, index)
    program, sources = whole(captured)
    run = build(there_and_back(program))
    (value,) = run(*arguments(captured, sources))
    wanted = model(x, index)
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    inputs = [x, *model.parameters()]
    for found, expected in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_writes_name_the_buffers_and_tell_hidden_ones() -> None:
    model = ConvNormRelu(2, 3)
    captured = capture(model, torch.randn(2, 2, 4, 4))
    program, sources = whole(captured)
    assert len(program.writes) == 3
    found = {
        sources[index].name.split("_buffers_")[1]: h for index, h in zip(program.writes, program.hidden, strict=True)
    }
    assert found == {"num_batches_tracked_": False, "running_mean_": True, "running_var_": True}
    kinds = [entry.kind for entry in program.inputs]
    assert (kinds.count("parameter"), kinds.count("buffer"), kinds.count("tensor")) == (3, 3, 1)


def test_state_brackets_hold_and_are_left_when_an_op_raises() -> None:
    state = State(grad=False, autocast=(Autocast("cpu", True, "bfloat16"),))
    program = Program(
        inputs=[Input("tensor"), Input("tensor")],
        nodes=[Op("torch.matmul", [Ref(0), Ref(1)], {}, state), Op("operator.mul", [Ref(0), 2])],
        outputs=[2, 3],
    )
    validate(program)
    run = build(program)
    x = torch.randn(2, 2, requires_grad=True)
    inside, outside = run(x, x)
    assert inside.dtype == torch.bfloat16
    assert not inside.requires_grad
    assert outside.requires_grad
    with pytest.raises(RuntimeError):
        run(x, torch.randn(3, 3))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_of_a_graph_comes_back() -> None:
    linear = nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(linear(x))
            with torch.autocast("cpu", enabled=False):
                y = F.linear(y.float(), linear.weight)
        return y * 2

    x = torch.randn(3, 4)
    captured = capture(model, x)
    program, sources = whole(captured)
    (value,) = build(there_and_back(program))(*arguments(captured, sources))
    torch.testing.assert_close(value, model(x), rtol=0, atol=0)


def test_seek_is_called_before_each_random_op() -> None:
    captured = capture(lambda x: F.dropout(F.dropout(x) + 1), torch.randn(8))
    program, sources = whole(captured)
    seeks: list[int] = []

    def seek(ordinal: int) -> None:
        seeks.append(ordinal)
        torch.manual_seed(ordinal)

    run = build(there_and_back(program), seek=seek)
    (first,), (second,) = (run(*arguments(captured, sources)) for _ in range(2))
    assert seeks == [0, 1, 0, 1]
    assert torch.equal(first, second)


def test_devices_are_replaced() -> None:
    program = Program([], [Op("torch.ones", [2], {"device": Named("device", "cuda:3")})], [0])
    (value,) = build(program, device="cpu")()
    assert value.device.type == "cpu"


def test_int_inputs() -> None:
    captured = capture(lambda x: x.view(x.shape[0] * 2, -1) + 1, torch.randn(4, 6), dynamic=True)
    program, sources = whole(captured)
    assert "int" in [entry.kind for entry in program.inputs]
    values = [12 if kind.kind == "int" else torch.zeros(4, 6) for kind in program.inputs]
    values = [4 if node.name == "s77" else value for node, value in zip(sources, values, strict=True)]
    run = build(there_and_back(program))
    assert run(*arguments(captured, sources))[0].shape == (8, 3)


@pytest.mark.parametrize(
    "constant",
    [None, True, 3, -2.5, math.inf, "same", 1 + 2j, torch.float16, torch.device("cpu"), torch.strided,
     torch.channels_last, slice(1, None, 2), ..., [1, (2, None)], {"a": [1]}],
)  # fmt: skip
def test_every_kind_of_argument_travels(constant: Any) -> None:
    from mpsrun.graph.build import _Builder
    from mpsrun.graph.encode import encode

    program = Program([], [Op("torch.add", [encode(constant, {})])], [0])
    (arg,) = there_and_back(program).nodes[0].args
    found = _Builder(program, None, None)._decode(arg, {})
    assert found == constant
    assert type(found) is type(constant)


def good() -> Program:
    return Program([Input("tensor")], [Op("torch.relu", [Ref(0)])], [1])


def cast(dtype: str, times: int = 1) -> State:
    return State(autocast=(Autocast("cpu", True, dtype),) * times)


HOSTILE: list[tuple[str, Program]] = [
    ("unknown op", Program([Input("tensor")], [Op("os.system", ["true"])], [1])),
    ("eval", Program([], [Op("builtins.eval", ["1"])], [0])),
    ("dunder method", Program([Input("tensor")], [Op("Tensor.__reduce__", [Ref(0)])], [1])),
    ("numpy", Program([Input("tensor")], [Op("Tensor.numpy", [Ref(0)])], [1])),
    ("file", Program([], [Op("torch.from_file", ["/etc/passwd"], {"size": 10})], [0])),
    ("load", Program([], [Op("torch.load", ["x"])], [0])),
    ("data_ptr", Program([Input("tensor")], [Op("Tensor.data_ptr", [Ref(0)])], [1])),
    ("attribute", Program([Input("tensor")], [Op("attr.__class__", [Ref(0)])], [1])),
    ("attribute of a constant", Program([Input("tensor")], [Op("attr.dtype", ["x"])], [1])),
    ("reference to itself", Program([Input("tensor")], [Op("torch.relu", [Ref(1)])], [1])),
    ("forward reference", Program([], [Op("torch.relu", [Ref(1)]), Op("torch.ones", [1])], [1])),
    ("negative reference", Program([Input("tensor")], [Op("torch.relu", [Ref(-1)])], [1])),
    ("nested forward reference", Program([], [Op("torch.cat", [Seq("list", [Ref(0)])])], [0])),
    ("output out of range", Program([Input("tensor")], [], [1])),
    ("output that is an input", Program([Input("tensor")], [Op("torch.relu", [Ref(0)])], [0])),
    ("write out of range", Program([Input("buffer")], [Op("torch.relu", [Ref(0)])], [1], [3], [True])),
    ("write of a parameter", Program([Input("parameter")], [Op("torch.relu", [Ref(0)])], [1], [0], [True])),
    ("missing flag", Program([Input("buffer")], [Op("torch.relu", [Ref(0)])], [1], [0], [])),
    ("wrong types", Program("inputs", 7, None)),  # type: ignore[arg-type]
    ("wrong argument", Program([], [Op("torch.relu", [object()])], [0])),  # type: ignore[list-item]
    ("unknown dtype", Program([], [Op("torch.ones", [2], {"dtype": Named("dtype", "load")})], [0])),
    ("unknown device", Program([], [Op("torch.ones", [2], {"device": Named("device", "x:y")})], [0])),
    ("unknown autocast", Program([], [Op("torch.ones", [2], {}, cast("int8"))], [0])),
    ("autocast twice", Program([], [Op("torch.ones", [2], {}, cast("float16", 2))], [0])),
    ("huge list", Program([], [Op("torch.tensor", [Seq("list", [0] * 100_000)])], [0])),
    ("huge text", Program([], [Op("torch.einsum", ["a" * 10_000])], [0])),
    ("too many nodes", Program([], [Op("torch.ones", [1])] * 60_000, [0])),
    ("list times number", Program([], [Op("operator.mul", [Seq("list", [0]), 10**9])], [0])),
    ("text times number", Program([], [Op("operator.mul", ["a", 10**9])], [0])),
    ("keyword", Program([], [Op("torch.ones", [1], {"a b": 1})], [0])),
]  # fmt: skip


@pytest.mark.parametrize(("what", "program"), HOSTILE, ids=[what for what, _ in HOSTILE])
def test_hostile_programs_are_refused(what: str, program: Program) -> None:
    with pytest.raises((ValueError, NotShippable)):
        validate(program)


def test_deep_nesting_is_refused() -> None:
    arg: Any = 1
    for _ in range(20):
        arg = Seq("list", [arg])
    with pytest.raises(ValueError, match="deeper"):
        validate(Program([], [Op("torch.tensor", [arg])], [0]))
    for _ in range(10_000):
        arg = Map({"a": arg})
    with pytest.raises(ValueError, match="program"):
        validate(Program([], [Op("torch.tensor", [arg])], [0]))


def test_powers_of_whole_numbers_are_bounded() -> None:
    run = build(Program([Input("int")], [Op("operator.pow", [Ref(0), 2**62])], [1]))
    with pytest.raises(ValueError, match="exponent"):
        run(3)


def test_a_good_program_passes() -> None:
    validate(good())
    (value,) = build(good())(torch.tensor([-1.0, 2.0]))
    assert value.tolist() == [0.0, 2.0]


def test_every_name_on_the_list_resolves_and_leads_back() -> None:
    names = ops._by_name()
    assert len(names) > 1000
    for name, target in names.items():
        assert callable(target), name
    for target, name in ops._by_target().items():
        assert ops.name_of("call_function", target) == name


def test_what_cannot_be_written_is_not_shippable() -> None:
    with torch.library._scoped_library("mpsrun_test", "DEF") as library:
        library.define("thrice(Tensor x) -> Tensor")
        library.impl("thrice", lambda x: x * 3, "CompositeExplicitAutograd")
        library.impl("thrice", torch.empty_like, "Meta")
        captured = capture(lambda x: torch.ops.mpsrun_test.thrice(x) + 1, torch.randn(3))
    with pytest.raises(NotShippable, match="not an op that can run in a worker"):
        whole(captured)


def test_outputs_of_a_stranger_are_an_error() -> None:
    captured = capture(lambda x: x.sin().cos(), torch.randn(3))
    with pytest.raises(ValueError, match="outside"):
        extract([captured.node("cos")], captured.effects, [captured.node("sin")])
