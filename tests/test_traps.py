"""In-place writes and aliases where running branches side by side would be wrong: refused, or the result is right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import mlp, rows
from torch import Tensor, nn
from transparency import TOLERANCE, Trained, assert_same, on_lanes, trained

from mpsrun.run import report

pytestmark = pytest.mark.usefixtures("workers")


def assert_right(
    make: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Any, ...]] = rows,
    refused: str | None = None,
    step: Callable[[Trained, tuple[Any, ...], int], dict[str, Any]] = Trained.step,
) -> list[report.Graph]:
    """Some steps on lanes and plainly see the same; `refused` is part of a reason that the report gives."""
    torch.manual_seed(0)
    plain = trained(make().double())
    fast = trained(on_lanes(copy.deepcopy(plain.model), 2))
    report.graphs.clear()
    for i in range(4):
        torch.manual_seed(i)
        given = inputs()
        torch.manual_seed(i)
        again = inputs()  # a second time, so that aliases among the inputs are kept
        wanted, found = step(plain, _double(given), i), step(fast, _double(again), i)
        assert_same(found, wanted, f"step {i}", TOLERANCE)
    reasons = [reason for graph in report.graphs for reason in graph.refusals]
    assert refused is None or any(refused in reason for reason in reasons), reasons
    return report.graphs


def _double(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


class Two(nn.Module):
    """Two layers of each kind, for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(6, 8, 6), mlp(6, 8, 6)
        self.trunk = nn.Linear(6, 6)


def test_branch_writes_what_its_sibling_reads() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            left = self.left(x.add_(1))
            return left * self.right(x)

    assert_right(Trap)


def test_branch_writes_what_its_sibling_has_read() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            left = torch.cat([x, x], 1).sum(1, keepdim=True)  # nothing of x is saved
            return left * self.right(x.mul_(2)) + self.left(x)

    assert_right(Trap)


def test_write_at_the_start_of_both_branches() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return self.left(x.mul_(2).clone()) * self.right(x.add_(1).clone())

    assert_right(Trap)


def test_write_through_a_view() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            x[:, :3].mul_(2)
            left = self.left(x)
            x.view(-1)[:4].zero_()
            return left.detach() + self.right(x)

    assert_right(Trap)


def test_write_through_detach() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            left = x.sum(1, keepdim=True)
            x.detach().add_(1)
            return left * self.right(x)

    assert_right(Trap)


def test_write_through_data() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            left = self.left(x)
            x.data.mul_(3)
            return left * self.right(x)

    assert_right(Trap)


def test_masked_and_indexed_writes() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            left = self.trunk(x)
            left[left > 0] = 0.5
            left.index_fill_(1, torch.tensor([1]), 2.0)
            left = self.left(left)
            right = self.right(x)
            right.masked_fill_(right < 0, 0)
            right[0] = left[1]
            return left + right

    assert_right(Trap)


def test_buffer_written_by_both_branches() -> None:
    class Trap(Two):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            left = self.left(x) + self.count
            self.count.mul_(2)
            return left * (self.right(x) + self.count)

    assert_right(Trap)


def test_buffer_written_by_one_branch_and_read_by_the_other() -> None:
    class Trap(Two):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            right = self.right(x) + self.mean
            left = self.left(x)
            self.mean.lerp_(left.detach().mean(0), 0.3)
            return left * right

    assert_right(Trap)


def test_buffer_that_is_a_view_of_another() -> None:
    class Trap(Two):
        both: Tensor
        part: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("both", torch.ones(2, 6, dtype=torch.float64))
            self.register_buffer("part", self.both[0])

        def forward(self, x: Tensor) -> Tensor:
            left = self.left(x)
            self.part.add_(left.detach().mean(0))
            return left + self.right(x) * self.both.sum(0)

    def make() -> nn.Module:
        return Trap()

    assert_right(make)


def test_same_batch_norm_in_both_branches() -> None:
    class Trap(Two):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.left(x)) * self.norm(self.right(x))

    assert_right(Trap)


def test_input_overlaps_another_input() -> None:
    """What one branch writes, the other one reads under another name: no graph shows it."""

    class Trap(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            left = self.left(y.mul_(2))
            return left + self.right(x)[1:]

    def inputs() -> tuple[Tensor, ...]:
        whole = torch.randn(5, 6, dtype=torch.float64)
        return whole, whole[1:]

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        output = trained.model(*given)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in trained.model.named_parameters() if p.grad is not None}
        return {"output": output.detach(), "inputs": given[0].clone(), **gradients}

    assert_right(Trap, inputs, step=step)


def test_inputs_overlap_later() -> None:
    """The first steps have inputs of their own, the later ones overlapping ones."""

    class Trap(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            left = self.left(y.mul_(2))
            return left + self.right(x)

    count = 0

    def inputs() -> tuple[Tensor, ...]:
        nonlocal count
        count += 1
        whole = torch.randn(6, 6, dtype=torch.float64)
        return (whole[1:], whole[:5]) if count > 4 else (whole[1:], whole[:5].clone())

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        output = trained.model(*given)
        output.square().sum().backward()
        return {n: p.grad for n, p in trained.model.named_parameters() if p.grad is not None}

    assert_right(Trap, inputs, step=step)


def test_inputs_overlap_without_a_common_storage() -> None:
    """Two tensors made from one array of NumPy's: nothing in them says so."""

    class Trap(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            left = self.left(y.mul_(2))
            return left + self.right(x)

    def inputs() -> tuple[Tensor, ...]:
        whole = torch.randn(6, 6, dtype=torch.float64).numpy()
        return torch.from_numpy(whole[1:]), torch.from_numpy(whole[:5])

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        trained.model(*given).square().sum().backward()
        return {n: p.grad for n, p in trained.model.named_parameters() if p.grad is not None}

    assert_right(Trap, inputs, step=step)


def test_same_input_twice() -> None:
    class Trap(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.left(x) * self.right(y)

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        leaf = given[0].clone().requires_grad_()
        trained.model(leaf, leaf).square().sum().backward()
        return {"gradient": leaf.grad}

    assert_right(Trap, step=step)


def test_outputs_that_are_inputs_or_each_other() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            left, right = self.left(x), self.right(x)
            return left, left, right.view(-1), right, x[:, :2], x

    assert_right(Trap)


def test_outputs_keep_their_aliases() -> None:
    """A script writes into one output and sees it in its view."""

    class Trap(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            left, right = self.left(x), self.right(x).tanh()
            return left, left[:, :2], right, right.t()

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        with torch.no_grad():
            outputs = trained.model(*given)
            outputs[0].fill_(7)
            outputs[3].add_(1)
        return dict(zip("abcd", outputs, strict=True))

    assert_right(Trap, step=step)


def test_outputs_written_by_the_script() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        left, right = trained.model(*given)
        left.add_(right.detach()).relu_()
        right[:, 0].mul_(2)
        (left + right).square().sum().backward()
        return {n: p.grad for n, p in trained.model.named_parameters() if p.grad is not None}

    assert_right(Trap, step=step)


def test_join_in_place() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            total = self.left(x)
            total += self.right(x)
            total *= 2
            return total.relu_()

    assert_right(Trap)


def test_input_written_after_the_join() -> None:
    """Backward of a branch needs its input as it was in forward: plain PyTorch raises, and so does this."""

    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            total = self.left(x) * self.right(x)
            x.zero_()
            return total

    torch.manual_seed(0)
    plain = Trap()
    for model in (plain, on_lanes(copy.deepcopy(plain), 2)):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model(*rows()).sum().backward()


def test_input_written_after_the_call() -> None:
    """A script that fills its input buffer anew before backward: plain PyTorch raises, and so does this."""

    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    torch.manual_seed(0)
    plain = Trap()
    for model in (plain, on_lanes(copy.deepcopy(plain), 2)):
        for _ in range(3):
            (x,) = rows()
            output = model(x)
            x.normal_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


def test_input_written_after_the_call_where_nobody_minds() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            return (self.trunk.weight * 2 + x.sum()).exp() + (self.trunk.weight.tanh() + x.mean()).sin()

    def step(trained: Trained, given: tuple[Any, ...], _: int) -> dict[str, Any]:
        trained.optimizer.zero_grad()
        output = trained.model(*given)
        given[0].normal_()
        output.square().sum().backward()
        return {"gradient": trained.model.trunk.weight.grad}  # type: ignore[union-attr]

    assert_right(Trap, step=step)


def test_expanded_tensors() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x).mean(0, keepdim=True).expand(5, 6)
            left = self.left(x)[:1].expand(5, 6)
            return left * self.right(x) + x

    assert_right(Trap)


def test_spectral_and_weight_norm() -> None:
    """Parametrisations that write buffers in forward."""

    class Trap(Two):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.spectral_norm(self.left[0])
            nn.utils.parametrizations.weight_norm(self.right[0])

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    assert_right(Trap)


def test_state_kept_on_the_module() -> None:
    """A branch leaves a tensor on its module, which the next step reads."""

    class Trap(Two):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.zeros(5, 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            left = self.left(x) + self.memory
            self.memory = left.detach() * 0.5
            return left * self.right(x)

    assert_right(Trap)


def test_parameter_written_in_forward() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.left[0].weight.clamp_(-0.2, 0.2)
            return self.left(x) * self.right(x)

    assert_right(Trap)


def test_every_region_refused_still_trains() -> None:
    class Trap(Two):
        def forward(self, x: Tensor) -> Tensor:
            left = self.left(torch.dropout(x, 0.5, True))
            return left * self.right(torch.dropout(x, 0.5, True))

    graphs = assert_right(Trap, refused="random op on the CPU")
    assert all(graph.calls == 0 for graph in graphs)
