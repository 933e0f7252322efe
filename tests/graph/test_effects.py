"""What analyze() finds out about single nodes."""

import itertools

import torch
import torch.nn.functional as F  # noqa: N812
from nets import capture
from torch import Tensor, fx, nn

from mpsrun.graph.order import Order
from mpsrun.graph.state import Autocast, State


def test_in_place_relu_writes_the_storage_of_its_input() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(2, 4))
    relu, linear = captured.node("relu"), captured.node("linear")
    facts = captured.effects.facts[relu]
    assert facts.writes == facts.outputs == captured.effects.facts[linear].outputs
    assert not facts.hidden_writes


def test_reads_after_an_in_place_write_come_after_it() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        z = y + 1
        y.mul_(3)
        return z + y.sum()

    captured = capture(model, torch.randn(3))
    deps = captured.effects.deps
    assert captured.node("add") in deps[captured.node("mul_")], "write after read"
    assert captured.node("mul_") in deps[captured.node("sum")], "read after write"


def test_views_share_the_storage_of_their_base() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1).t().add_(1)
        return y

    captured = capture(model, torch.randn(2, 2))
    facts = captured.effects.facts
    product = facts[captured.node("mul")]
    assert facts[captured.node("view")].outputs == product.outputs
    assert facts[captured.node("add_")].writes == product.outputs
    assert facts[captured.node("view")].kernels == 0


class Statistics(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.data.add_(1)
        return self.norm(x)


def test_batch_norm_writes_its_statistics_unseen_by_version_counters() -> None:
    captured = capture(Statistics(), torch.randn(3, 4))
    norm = captured.effects.facts[captured.node("batch_norm")]
    assert len(norm.writes) == 2
    assert norm.hidden_writes == norm.writes
    buffers = [node for node, kind in captured.effects.placeholder_kind.items() if kind == "buffer"]
    assert norm.writes <= set().union(*(captured.effects.facts[node].outputs for node in buffers))


def test_batch_norm_in_eval_mode_writes_nothing() -> None:
    captured = capture(Statistics().eval(), torch.randn(3, 4))
    assert not captured.effects.facts[captured.node("batch_norm")].writes


def test_writes_through_data_are_seen_and_hidden() -> None:
    captured = capture(Statistics(), torch.randn(3, 4))
    write = captured.effects.facts[captured.node("add_")]
    assert write.writes
    assert write.hidden_writes == write.writes
    assert write.floating


def test_counter_of_batch_norm_is_a_visible_write() -> None:
    captured = capture(nn.BatchNorm1d(4), torch.randn(3, 4))
    counter = captured.effects.facts[captured.node("add_")]
    assert counter.writes
    assert not counter.hidden_writes


def test_analysis_leaves_version_counters_of_dynamos_tensors_alone() -> None:
    captured = capture(nn.BatchNorm1d(4), torch.randn(3, 4))
    counter = captured.node("add_").args[0]
    before = counter.meta["example_value"]._version  # type: ignore[union-attr]
    from mpsrun.graph.effects import analyze

    analyze(captured.gm)
    assert counter.meta["example_value"]._version == before  # type: ignore[union-attr]


def test_embedding_with_max_norm_writes_its_weight() -> None:
    captured = capture(nn.Embedding(5, 3, max_norm=1.0), torch.tensor([1, 2]))
    weights = [node for node, kind in captured.effects.placeholder_kind.items() if kind == "parameter"]
    written = set().union(*(fact.writes for fact in captured.effects.facts.values()))
    assert written == captured.effects.facts[weights[0]].outputs


def test_nodes_carry_the_autocast_state() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        before = x @ w
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = F.linear(x, w)
        return before + inside.float()

    captured = capture(model, torch.randn(3, 3), torch.randn(3, 3))
    facts = captured.effects.facts
    assert facts[captured.node("matmul")].state is None
    state = facts[captured.node("linear")].state
    assert state is not None
    assert state.autocast == (Autocast("cpu", True, "bfloat16"),)
    assert facts[captured.node("float")].state is None
    assert captured.effects.values[captured.node("linear")].dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert facts[captured.node("_enter_autocast")].is_state


def test_nodes_carry_grad_mode() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        return y + x.cos()

    captured = capture(model, torch.randn(3, requires_grad=True))
    facts = captured.effects.facts
    assert facts[captured.node("sin")].state == State(grad=False)
    assert facts[captured.node("cos")].state == State(grad=True)


def test_dropout_is_random_only_where_it_drops() -> None:
    x = torch.randn(8)
    for module, random in (
        (nn.Dropout(0.5), True),
        (nn.Dropout(0.0), False),
        (nn.Dropout(0.5).eval(), False),
    ):
        captured = capture(lambda x, module=module: module(x) + 1, x)
        assert any(fact.random for fact in captured.effects.facts.values()) == random


def test_random_nodes_are_chained() -> None:
    captured = capture(lambda x: F.dropout(x) + torch.rand(3), torch.randn(3))
    assert captured.effects.random_order[captured.node("rand")] == {captured.node("dropout")}


def test_attention_without_dropout_is_not_random() -> None:
    q = torch.randn(1, 2, 4, 8)
    captured = capture(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    fact = captured.effects.facts[captured.node("scaled_dot_product_attention")]
    assert not fact.random
    assert fact.flops > 0


def test_item_is_a_sync() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        captured = capture(lambda x: x * x.sum().item(), torch.randn(3))
    assert captured.effects.facts[captured.node("item")].sync


def test_nonzero_is_a_sync() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(lambda x: x.nonzero() + 1, torch.randn(3))
    assert captured.effects.facts[captured.node("nonzero")].sync


def test_checkpointed_part_is_opaque_and_its_writes_are_known() -> None:
    norm = nn.BatchNorm1d(4)

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False) + 1

    captured = capture(model, torch.randn(3, 4))
    fact = captured.effects.facts[captured.node("tag_activation_checkpoint")]
    assert fact.opaque is not None
    assert len(fact.writes) == 3


def test_custom_op_is_opaque() -> None:
    with torch.library._scoped_library("mpsrun_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")
        captured = capture(lambda x: torch.ops.mpsrun_test.twice(x) + 1, torch.randn(3))
        reasons = [fact.opaque for fact in captured.effects.facts.values() if fact.opaque]
    assert len(reasons) == 1
    assert "custom op" in reasons[0]


def test_kinds_of_placeholders() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4))
    kinds = list(captured.effects.placeholder_kind.values())
    assert {kind: kinds.count(kind) for kind in kinds} == {"parameter": 4, "buffer": 3, "input": 1}


def test_frozen_parameters_stay_known() -> None:
    captured = capture(nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4))
    assert "input" in captured.effects.placeholder_kind.values()
    assert list(captured.effects.placeholder_kind.values()).count("input") == 1


def test_symbolic_shapes_stay_symbolic() -> None:
    def model(x: Tensor) -> Tensor:
        return F.linear(x, torch.ones(4, x.shape[1])).view(x.shape[0], 2, 2) + torch.arange(x.shape[0]).view(-1, 1, 1)

    captured = capture(model, torch.randn(3, 5), dynamic=True)
    assert "symint" in captured.effects.placeholder_kind.values()
    value = captured.effects.values[captured.node("linear")]
    assert isinstance(value.shape[0], torch.SymInt)  # type: ignore[attr-defined]
    assert captured.effects.facts[captured.node("linear")].flops == 2 * 3 * 5 * 4
    assert captured.effects.facts[captured.node("arange")].floating


def test_one_graph_serves_all_sizes() -> None:
    calls = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        from mpsrun.graph.effects import analyze
        from mpsrun.graph.regions import find_regions

        find_regions(gm, analyze(gm))
        calls.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(lambda x: (x @ x.t()).view(-1).relu(), backend=backend, dynamic=True)
    for size in (3, 4, 7):
        model(torch.randn(size, 5))
    assert len(calls) == 1


def test_where_gives_the_users_line() -> None:
    captured = capture(lambda x: x.sin() + 1, torch.randn(3))
    where = captured.effects.where(captured.node("sin"))
    assert where is not None
    assert where.startswith("test_effects.py:")
    assert "x.sin() + 1" in where


def test_inference_mode_and_inference_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with torch.inference_mode():
        captured = capture(model, torch.randn(2, 4))
    fact = captured.effects.facts[captured.node("relu")]
    assert fact.writes
    assert fact.opaque is None


def test_nothing_passes_a_mode_that_is_not_followed() -> None:
    def model(q: Tensor) -> Tensor:
        before = q.sin()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, q, q)
        return y + before + q.cos()

    captured = capture(model, torch.randn(1, 2, 4, 8))
    effects = captured.effects
    barriers = [node for node, fact in effects.facts.items() if fact.barrier]
    assert "_sdpa_kernel" in [getattr(node.target, "__name__", "") for node in barriers]
    order = Order(list(effects.order), effects.deps)
    path: list[str | fx.Node] = ["sin", barriers[0], "scaled_dot_product_attention", barriers[-1], "cos"]
    nodes = [captured.node(step) if isinstance(step, str) else step for step in path]
    for earlier, later in itertools.pairwise(nodes):
        assert order.above[later] & order.bit[earlier]
    assert captured.shape() == []


def test_transforms_of_torch_func_stay_in_the_lead() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row.sin() * 2 + row.cos() * 3)(x)

    captured = capture(model, torch.randn(3, 4))
    assert captured.shape() == []
    assert captured.effects.facts[captured.node("sin")].opaque is not None
