"""Which forks become regions, with which branches, and why others do not."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from nets import Captured, ConvNormRelu, GoogLeNet, Inception, capture
from torch import Tensor, nn


def test_googlenet_has_nine_regions_of_four_branches() -> None:
    captured = capture(GoogLeNet(), torch.randn(2, 1, 8, 8))
    assert captured.shape() == [4] * 9
    assert not captured.found.refusals
    for region in captured.found.regions:
        assert all(branch.pinned is None for branch in region.branches)
        assert [branch.kernels for branch in region.branches] == [4, 8, 8, 5], "counters come along"
        assert [len(branch.outputs) for branch in region.branches] == [1] * 4
        assert region.where is not None
        assert region.where.startswith("nets.py:")


def test_googlenet_in_eval_mode_and_without_gradients() -> None:
    with torch.no_grad():
        assert capture(GoogLeNet(2).eval(), torch.randn(2, 1, 8, 8)).shape() == [4, 4]


class Two(nn.Module):
    """Two towers on inputs of their own."""

    def __init__(self, join: bool = True) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.join = join

    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        left, right = self.left(x), self.right(y)
        return left @ right.mT if self.join else (left, right)


def test_towers_with_inputs_of_their_own() -> None:
    assert capture(Two(), torch.randn(3, 4), torch.randn(3, 6)).shape() == [2]


def test_heads_without_a_join() -> None:
    captured = capture(Two(join=False), torch.randn(3, 4), torch.randn(3, 6))
    assert captured.shape() == [2]
    assert all(len(branch.outputs) == 1 for branch in captured.found.regions[0].branches)


def test_a_branch_that_is_also_the_models_output() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = left(x).relu(), right(x).relu()
        return a, a + b

    assert capture(model, torch.randn(2, 4)).shape() == [2]


def test_a_sum_of_towers_is_one_fork() -> None:
    towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))
    captured = capture(lambda x: sum(tower(x) for tower in towers), torch.randn(2, 4))
    assert captured.shape() == [5]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inception(8, 2)
        self.before, self.after = ConvNormRelu(4, 8), ConvNormRelu(8, 4)
        self.side = ConvNormRelu(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x))) + self.side(x)


def test_nested_forks_know_their_parent() -> None:
    captured = capture(Nested(), torch.randn(2, 4, 6, 6))
    assert captured.shape() == [2, 4]
    outer, inner = captured.found.regions
    assert outer.parent is None
    assert inner.parent is not None
    index, branch = inner.parent
    assert index == outer.index
    nodes = {node for part in inner.branches for node in part.nodes}
    assert nodes < set(outer.branches[branch].nodes)


class Residual(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNormRelu(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(x + block(x))
        return x


def test_residual_chain_has_no_region() -> None:
    captured = capture(Residual(3), torch.randn(2, 4, 6, 6))
    assert captured.shape() == []
    assert not captured.found.refusals


def test_projection_shortcut_is_a_branch() -> None:
    body, shortcut = ConvNormRelu(4, 8, 3), ConvNormRelu(4, 8)
    assert capture(lambda x: F.relu(body(x) + shortcut(x)), torch.randn(2, 4, 6, 6)).shape() == [2]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(2, 5, 8))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_query_key_and_value_are_three_branches_though_a_mask_goes_to_every_layer() -> None:
    captured = capture(Transformer(), torch.randn(2, 5, 8), torch.zeros(5, 5))
    assert captured.shape() == [3, 3]
    assert all(branch.pinned is None for region in captured.found.regions for branch in region.branches)


def test_views_of_the_input_belong_to_the_branches() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(8, 4)
    captured = capture(lambda x: left(x.view(4, 4)) + right(x.view(2, 8)).sum(), torch.randn(2, 8))
    (region,) = captured.found.regions
    for branch in region.branches:
        inputs = [node for node in branch.inputs if captured.effects.placeholder_kind.get(node) == "input"]
        assert len(inputs) == 1
        assert len(branch.inputs) == 3


def test_parts_of_a_split_are_inputs_of_branches() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return left(a).relu() + right(b).tanh()

    captured = capture(model, torch.randn(2, 8))
    assert captured.shape() == [2]
    assert all(branch.pinned is None for branch in captured.found.regions[0].branches)


def test_shared_parameter_is_only_read() -> None:
    shared = nn.Linear(4, 4)
    captured = capture(lambda x: shared(x).relu() + shared(x * 2).tanh(), torch.randn(2, 4))
    assert captured.shape() == [2]
    assert all(branch.pinned is None for branch in captured.found.regions[0].branches)


def test_shared_batch_norm_is_one_branch() -> None:
    shared = nn.BatchNorm1d(4)
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)
    captured = capture(lambda x: shared(left(x)).relu() + shared(right(x)).tanh(), torch.randn(3, 4))
    assert captured.shape() == []
    (refusal,) = captured.found.refusals
    assert "in place" in refusal.reason


def test_branch_that_writes_its_shared_input_is_refused() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        x = x * 1
        a = left(x).tanh()
        b = right(F.relu(x, inplace=True))
        return a + b

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == []
    (refusal,) = captured.found.refusals
    assert "writes a tensor in place that its sibling at test_regions.py:" in refusal.reason
    assert "right(F.relu(x, inplace=True))" in refusal.reason
    assert "left(x).tanh()" in refusal.reason


def test_branch_that_writes_a_parameter_stays_in_the_lead() -> None:
    embedding, other = nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4)
    captured = capture(lambda i, x: embedding(i) + other(x).tanh(), torch.tensor([1, 2]), torch.randn(2, 4))
    (region,) = captured.found.regions
    reasons = [branch.pinned for branch in region.branches]
    assert sum(reason is None for reason in reasons) == 1
    assert any(reason is not None and "made outside" in reason for reason in reasons)


def test_input_written_afterwards_keeps_its_readers_in_the_lead() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        y = x * 2
        z = left(y).tanh() + right(y).relu()
        return y.mul_(z.sum())

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == []
    assert "afterwards" in captured.found.refusals[0].reason


def test_a_float_that_changes_is_named() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)
    graphs: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Captured(gm, inputs))
        return gm.forward

    torch._dynamo.reset()

    @torch.compile(backend=backend)
    def model(x: Tensor, scale: float) -> Tensor:
        return left(x) * scale + right(x).relu() * scale

    for scale in (0.5, 0.7):
        model(torch.randn(2, 4), scale)
    assert [captured.shape() for captured in graphs] == [[2], []], "the first is for just one value"
    (refusal,) = graphs[-1].found.refusals
    assert "reads l_scale_, a float that changes from call to call; pass it as a tensor" in refusal.reason


def test_output_that_is_a_view_of_an_input_stays_in_the_lead() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        a = left(x).relu()
        return torch.cat([a, right(x).tanh()]), a[0]

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == [2]
    for branch in captured.found.regions[0].branches:
        assert branch.pinned is None
        assert len(branch.outputs) == 1


def test_dropout_on_the_cpu_stays_in_the_lead() -> None:
    left, right = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.Linear(4, 4)
    captured = capture(lambda x: left(x) + right(x).relu(), torch.randn(2, 4))
    (region,) = captured.found.regions
    pinned = [branch.pinned for branch in region.branches]
    assert pinned[1] is None
    assert pinned[0] is not None
    assert "random op on the CPU" in pinned[0]


def test_random_draw_between_branches_refuses_the_region() -> None:
    left, right = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.Sequential(nn.Linear(4, 4), nn.Dropout())

    def model(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a = left(x)
        noise = torch.rand(2)
        return a + right(x), noise

    captured = capture(model, torch.randn(2, 4), torch.randn(2))
    assert captured.shape() == []
    assert "draws random numbers between the branches" in captured.found.refusals[0].reason


def test_several_outputs_and_lstm() -> None:
    lstm, linear = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        y, (h, _) = lstm(x)
        return linear(x).relu() + y + h.transpose(0, 1)

    captured = capture(model, torch.randn(2, 3, 4))
    assert captured.shape() == [2]
    assert sorted(len(branch.outputs) for branch in captured.found.regions[0].branches) == [1, 2]
    assert all(branch.pinned is None for branch in captured.found.regions[0].branches)


class HRNet(nn.Module):
    """Two resolutions that are kept apart, fused, and kept apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormRelu(1, 4, 3)
        self.change = nn.ModuleList([ConvNormRelu(4, 4, 3), ConvNormRelu(4, 8, 3, stride=2)])
        self.fine = nn.ModuleList(Residual(1) for _ in range(2))
        self.coarse = nn.ModuleList(self.wide() for _ in range(2))
        self.up, self.down = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1)

    @staticmethod
    def wide() -> nn.Module:
        return nn.Sequential(ConvNormRelu(8, 8, 3), ConvNormRelu(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        fine, coarse = (change(x) for change in self.change)
        for fine_part, coarse_part in zip(self.fine, self.coarse, strict=True):
            fine, coarse = fine_part(fine), coarse_part(coarse)
            up, down = F.interpolate(self.up(coarse), scale_factor=2), self.down(fine)
            fine, coarse = F.relu(fine + up), F.relu(coarse + down)
        return fine.mean() + coarse.mean()


def test_hrnet_forks_at_every_level() -> None:
    captured = capture(HRNet(), torch.randn(2, 1, 8, 8))
    assert captured.shape() == [2, 2, 2, 2]
    assert not captured.found.refusals


def test_long_sums_are_no_levels_of_their_own() -> None:
    """Each of three branches gets what the others make of theirs, as in HRNet; all start at the same time."""
    before, after = ([nn.Linear(4, 4) for _ in range(3)] for _ in range(2))
    paths = [[nn.Linear(4, 4) if i != k else nn.Identity() for k in range(3)] for i in range(3)]

    def model(x: Tensor) -> Tensor:
        given = [layer(x).relu() for layer in before]
        parts = [[step(part) for step, part in zip(path, given, strict=True)] for path in paths]
        mixed = [part[0] + part[1] + part[2] for part in parts]
        first, second, third = (layer(part.relu()) for layer, part in zip(after, mixed, strict=True))
        return first * second * third

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == [3, 6, 3]
    assert not captured.found.refusals
    place = {node: number for number, node in enumerate(captured.gm.graph.nodes)}
    for region in captured.found.regions:
        starts = [place[branch.nodes[0]] for branch in region.branches]
        assert starts == sorted(starts), "branches are in the order of the program"


def test_what_two_sums_need_is_a_part_of_neither() -> None:
    before, after = [nn.Linear(4, 4) for _ in range(4)], [nn.Linear(4, 4) for _ in range(2)]

    def model(x: Tensor) -> Tensor:
        left, both, right, last = (layer(x).relu() for layer in before)
        sums = left + both + last, both + right + last
        first, second = (layer(part).relu() for layer, part in zip(after, sums, strict=True))
        return first * second

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == [4, 2, 2]
    assert not captured.found.refusals


def test_what_another_join_needs_is_not_held_up() -> None:
    """A cell reads the two before it: what it makes of the older one runs beside the newer one, as in NASNet."""
    narrow = [[nn.Linear(4, 4) for _ in range(2)] for _ in range(4)]
    wide = [[nn.Linear(4, 4) for _ in range(4)] for _ in range(4)]

    def model(x: Tensor) -> Tensor:
        older = newer = x.relu()
        for ours, theirs in zip(narrow, wide, strict=True):
            near, far = ours[0](newer).relu(), ours[1](older).relu()
            parts = [layer(given).relu() for layer, given in zip(theirs, (near, near, far, far), strict=True)]
            older, newer = newer, torch.cat([parts[0], parts[1] + parts[2], parts[3]], 1)[:, :4]
        return newer

    captured = capture(model, torch.randn(2, 4))
    assert captured.shape() == [3, 6, 2, 4, 2, 4, 2]
    assert not captured.found.refusals


def test_parameter_arithmetic_joins_its_branch() -> None:
    left = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    right = nn.Linear(4, 4)
    captured = capture(lambda x: left(x).relu() + right(x), torch.randn(2, 4))
    (region,) = captured.found.regions
    assert captured.node("_weight_norm") in region.branches[0].nodes


def test_parameter_arithmetic_of_two_branches_stays_in_the_lead() -> None:
    weight = nn.Parameter(torch.randn(4, 4))

    def model(x: Tensor) -> Tensor:
        w = weight.exp()
        return F.linear(x, w).relu() + F.linear(x * 2, w).tanh()

    captured = capture(model, torch.randn(2, 4))
    (region,) = captured.found.regions
    assert all(captured.node("exp") not in branch.nodes for branch in region.branches)
    assert all(captured.node("exp") in branch.inputs for branch in region.branches)


def test_dynamic_shapes() -> None:
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        return left(x.view(x.shape[0] * x.shape[1], 4)).relu() + right(x.view(-1, 4)).tanh()

    captured = capture(model, torch.randn(2, 3, 4), dynamic=True)
    assert captured.shape() == [2]
    assert all(branch.pinned is None for branch in captured.found.regions[0].branches)


def test_checkpointed_branch_stays_in_the_lead() -> None:
    left, right = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(left, x, use_reentrant=False) + right(x).tanh()

    captured = capture(model, torch.randn(2, 4))
    (region,) = captured.found.regions
    pinned = [branch.pinned for branch in region.branches]
    assert [reason is None for reason in pinned] == [False, True]
    assert "holds a graph of its own" in str(pinned[0])
