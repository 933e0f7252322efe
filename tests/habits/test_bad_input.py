"""What cannot run on lanes runs in the lead: the plain result, and a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from alike import Seen, parameter, same, state, sum_of, train, x
from networks import Three, mlp
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpsrun.run import report

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")


def reasons(graphs: list[report.Graph]) -> str:
    return "\n".join(reason for graph in graphs for reason in graph.refusals)


class Marked(Tensor):
    """A subclass that does nothing but be one, and hands itself on."""


def test_subclass_as_input() -> None:
    def script(model: nn.Module) -> Seen:
        seen: Seen = {}
        for i in range(3):
            output = model(x(i).as_subclass(Marked))
            assert type(output) is Marked
            sum_of(output.as_subclass(Tensor)).backward()
            seen[f"output {i}"] = output.detach().as_subclass(Tensor)
        return {**seen, "losses": torch.stack(train(model, 2)), **state(model)}

    same(script, calls=4)


def test_subclass_as_parameter() -> None:
    class Weight(nn.Parameter):
        pass

    def make() -> nn.Module:
        model = Three()
        model.paths[2][0].weight = Weight(model.paths[2][0].weight.detach())
        return model

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script, make=make, calls=0)


class Sums(nn.Module):
    """Branches that multiply their weights with the input, dense or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(torch.mm(x, weight)) for weight in self.weights], 1)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_input(layout: torch.layout) -> None:
    def script(model: nn.Module) -> Seen:
        seen: Seen = {"losses": torch.stack(train(model, 3))}
        for i in range(3):
            output = model(F.relu(x(i)).to_sparse(layout=layout))
            sum_of(output).backward()
            seen[f"output {i}"] = output.detach()
        return {**seen, **state(model)}

    same(script, make=Sums, calls=6)


def test_sparse_gradients() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(7, 4, sparse=True) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.abs().mul(3).long().clamp(max=6)
            pairs = zip(self.tables, self.heads, strict=True)
            return torch.cat([head(torch.tanh(table(rows)).sum(1)) for table, head in pairs], 1)

    def script(model: nn.Module) -> Seen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = train(model, 4, optimizer=optimizer)
        tables = [p.grad for n, p in model.named_parameters() if n.startswith("tables") and p.grad is not None]
        assert all(gradient.is_sparse for gradient in tables)
        dense = {f"gradient of table {i}": gradient.to_dense() for i, gradient in enumerate(tables)}
        return {"losses": torch.stack(losses), **dense, **model.state_dict()}

    assert "sparse gradient" in reasons(same(script, make=Tables, calls=0))


@torch.library.custom_op("habits::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    """An op of the script's own, which no worker knows."""
    return x * 0.5


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda context, gradient: gradient * 0.5)


class OwnOp(Three):
    def forward(self, x: Tensor) -> Tensor:
        found = [path(x) for path in self.paths]
        found[0] = halved(found[0]) + self.paths[0](x)
        return self.head(torch.cat(found, 1))


def test_op_of_the_script() -> None:
    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    assert "halved" in reasons(same(script, make=OwnOp, calls=4))


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.exp() * 2  # not the derivative, so that it shows who computed it


def test_autograd_function_of_the_script() -> None:
    class Network(Three):
        def forward(self, x: Tensor) -> Tensor:
            found = [path(x) for path in self.paths]
            return self.head(torch.cat([OwnFunction.apply(found[0]), *found[1:]], 1))

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    same(script, make=Network, calls=0)


def test_devices_that_are_mixed() -> None:
    """A branch that works on another device beside two that do not."""

    class Network(Three):
        def forward(self, x: Tensor) -> Tensor:
            sizes = torch.empty(x.shape, device="meta").tanh().sum(1)
            first = self.paths[0](x) * sizes.shape[0]
            return self.head(torch.cat([first, self.paths[1](x), self.paths[2](x)], 1))

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    same(script, make=Network, calls=4)


def test_all_on_another_device() -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        shape = model.to_empty(device="meta")(torch.empty(3, 6, device="meta", dtype=torch.float64)).shape
        return {"losses": torch.stack(losses), "shape": tuple(shape)}

    same(script, calls=4)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_and_hessian(vectorize: bool) -> None:
    """Gradients of gradients, and many backward passes at once."""

    def script(model: nn.Module) -> Seen:
        seen: Seen = {}
        model.eval()
        for i in range(2):
            jacobian = torch.autograd.functional.jacobian(model, x(i), vectorize=vectorize)
            hessian = torch.autograd.functional.hessian(lambda v: sum_of(model(v)), x(i), vectorize=vectorize)
            seen |= {f"jacobian {i}": jacobian, f"hessian {i}": hessian}
        return {**seen, "losses": torch.stack(train(model, 2)), **state(model)}

    same(script, calls=4)


def test_batched_gradients_of_parameters() -> None:
    def script(model: nn.Module) -> Seen:
        some = [parameter(model, n) for n in ("trunk.weight", "paths.0.0.weight", "paths.2.3.bias")]
        output = model(x()).flatten()
        directions = torch.eye(len(output), dtype=output.dtype, device=output.device)
        found = torch.autograd.grad(output, some, directions, is_grads_batched=True, retain_graph=True)
        found += torch.func.vmap(lambda one: torch.autograd.grad(output, some, one, retain_graph=True))(directions)
        sum_of(output).backward()
        return {**{f"{i}": g for i, g in enumerate(found)}, **state(model)}

    same(script)


def tangent(model: nn.Module, given: Tensor) -> Tensor:
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(given, torch.ones_like(given)))
        return forward_ad.unpack_dual(output).tangent.clone()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "forward mode": tangent,
    "vmap": lambda model, given: torch.func.vmap(model)(given.unsqueeze(1)),
    "grad": lambda model, given: torch.func.grad(lambda v: sum_of(model(v)))(given),
    "jvp": lambda model, given: torch.func.jvp(model, (given,), (torch.ones_like(given),))[1],
    "vjp": lambda model, given: torch.func.vjp(model, given)[1](torch.ones_like(given[:, :2]))[0],
    "functional call": lambda model, given: torch.func.functional_call(
        model, {n: p * 2 for n, p in model.named_parameters()}, (given,)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    def script(model: nn.Module) -> Seen:
        model.eval()
        seen = {f"{i}": TRANSFORMS[name](model, x(i)).detach() for i in range(3)}
        return {**seen, "losses": torch.stack(train(model, 2)), **state(model)}

    same(script, calls=2)


def test_complex_numbers() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = mlp(6, 8, 6), nn.ModuleList(mlp(8, 8, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.fft.rfft(self.before(x))
            found = [path(torch.view_as_real(x * (i + 1j)).flatten(1)) for i, path in enumerate(self.after)]
            return torch.cat(found, 1)

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 4)), **state(model)}

    same(script, make=Waves, calls=0)
