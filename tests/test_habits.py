"""What scripts do with autograd beside the plain loop: each habit done plainly and on lanes, with the same result."""

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pool
import psutil
import pytest
import torch
from networks import Heads, Three
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transparency import TOLERANCE, assert_same, on_lanes

from mpsrun.run import report
from mpsrun.run.coordinator import Coordinator

Seen = dict[str, Any]
Script = Callable[[nn.Module], Seen]
FIRST, LAST = "paths.0.0.weight", "paths.2.0.weight"  # of three branches, one of these two is a worker's

pytestmark = pytest.mark.usefixtures("workers")


def same(script: Script, make: Callable[[], nn.Module] = Three, calls: int = 1) -> None:
    """What `script` sees is the same on a plain model and on one with two workers, which ran at least so often."""
    torch.manual_seed(0)
    plain = make().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    report.graphs.clear()
    warm_up(plain), warm_up(fast)
    before = executed()
    torch.manual_seed(1)
    wanted = script(plain)
    torch.manual_seed(1)
    found = script(fast)
    assert_same(found, wanted, "at the end", TOLERANCE)
    assert executed() - before >= calls


def executed() -> int:
    """How many forwards the workers have run."""
    coordinator = pool.current()
    assert coordinator is not None
    return sum(sum(counts.forwards.values()) for counts in coordinator.counts().values())


def x(seed: int = 0, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator)


def warm_up(model: nn.Module) -> None:
    """The first call looks, the second one runs on lanes."""
    for _ in range(2):
        sum_of(model(x())).backward()
    model.zero_grad()


def sum_of(outputs: Any) -> Tensor:
    tensors = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def gradients(model: nn.Module) -> Seen:
    """The gradients as they are now."""
    return {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def state(model: nn.Module) -> Seen:
    return {**{n: value.clone() for n, value in model.state_dict().items()}, **gradients(model)}


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def train(model: nn.Module, steps: int, start: int = 0, to_none: bool = True) -> list[Tensor]:
    """A plain loop; the losses."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad(set_to_none=to_none)
        loss = sum_of(model(x(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Every slot of the arena is free again at the end."""
    yield
    torch._dynamo.reset()
    gc.collect()
    coordinator = pool.current()
    assert coordinator is not None
    with coordinator.lock:
        assert coordinator._arena.in_use - len(coordinator._retired) == 0


def test_several_forwards_before_one_backward(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        sum_of(torch.stack([model(x(i)) for i in range(5)])).backward()
        return state(model)

    same(script, calls=10)


def test_backwards_in_another_order_than_forwards(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        outputs = [model(x(i)) for i in range(4)]
        for i in (2, 0, 3, 1):
            sum_of(outputs[i]).backward()
        return state(model)

    same(script, calls=8)


def test_forwards_without_backward_leave_nothing(workers: Coordinator, nothing_kept: None) -> None:
    """The slots are used again, and the workers forget the activations: 400 MB if they did not."""
    model = on_lanes(Three(width=512).double(), 2)
    batch = x(rows=256)
    train(model, 2)
    for _ in range(20):
        model(batch)
    processes = [psutil.Process(pid) for pid in pool.pids()]
    before = sum(process.memory_info().rss for process in processes)
    chunks = len(workers._arena.chunks)
    for _ in range(200):
        model(batch)
    pool.settle(workers)
    grown = sum(process.memory_info().rss for process in processes) - before
    assert grown < 40 << 20
    assert len(workers._arena.chunks) == chunks
    assert workers._arena.in_use <= 4


def test_training_leaves_nothing(workers: Coordinator, nothing_kept: None) -> None:
    model = on_lanes(Three().double(), 2)
    train(model, 10)
    chunks = len(workers._arena.chunks)
    train(model, 100)
    assert len(workers._arena.chunks) == chunks
    assert workers._arena.in_use <= 4


def test_retain_graph(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        loss.backward(retain_graph=True)
        first = gradients(model)
        loss.backward(retain_graph=True)
        loss.backward()
        return {**{f"first {n}": g for n, g in first.items()}, **gradients(model)}

    same(script)


def test_second_backward_raises() -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        train(model, 2)
        return state(model)

    same(script)


@pytest.mark.parametrize("name", ["paths.0.0.weight", "paths.1.3.bias", "paths.2.0.weight", "trunk.weight"])
def test_gradient_of_one_parameter(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        loss = sum_of(model(x()))
        (one,) = torch.autograd.grad(loss, [parameter(model, name)], retain_graph=True)
        seen = {"one": one, **{f"untouched {n}": g for n, g in gradients(model).items()}}
        loss.backward()
        sum_of(model(x(1))).backward()
        return {**seen, **state(model)}

    same(script)


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_gradient_of_one_parameter_only(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            (seen[str(i)],) = torch.autograd.grad(sum_of(model(x(i))), [parameter(model, name)])
        return {**seen, **{n: p.grad for n, p in model.named_parameters()}}

    same(script)


@pytest.mark.parametrize("kept", ["a", "b", "c"])
def test_parameters_without_gradient(kept: str, nothing_kept: None) -> None:
    """Nothing is handed to parameters that no gradient reaches: they stay None, and no hook fires."""

    def script(model: nn.Module) -> Seen:
        fired: list[str] = []
        for name, p in model.named_parameters():
            p.register_hook(lambda _, name=name: fired.append(name))
            p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(f"after {name}"))
        model(x())[kept].sum().backward()
        return {"fired": sorted(fired), **gradients(model)}

    same(script, make=Heads)


@pytest.mark.parametrize("name", [FIRST, LAST, "trunk.weight", "head.weight"])
def test_hook_that_raises(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        def refuse(_: Tensor) -> None:
            raise KeyError("a hook of the user's")

        handle = parameter(model, name).register_hook(refuse)
        for i in range(3):
            with pytest.raises(KeyError, match="a hook of the user's"):
                sum_of(model(x(i))).backward()
        handle.remove()
        model.zero_grad()
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script)


def test_gradient_accumulation(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        for i in range(4):
            (sum_of(model(x(i))) / 4).backward()
        return state(model)

    same(script)


def test_zeroed_gradients() -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 4, to_none=False)
        first = parameter(model, LAST).grad
        losses += train(model, 2, start=4, to_none=False)
        assert parameter(model, LAST).grad is first
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(mode: Any, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for epoch in range(3):
            seen[f"losses {epoch}"] = torch.stack(train(model, 2, start=epoch))
            model.eval()
            with mode():
                for i in range(3):
                    seen[f"evaluated {epoch} {i}"] = model(x(10 + i)).clone()
            model.train()
        return {**seen, **state(model)}

    same(script, calls=16)


def test_evaluation_with_gradients(nothing_kept: None) -> None:
    """Adversarial examples: gradients of the input, with the model in eval mode."""

    def script(model: nn.Module) -> Seen:
        model.eval()
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            sum_of(model(given)).backward()
            seen[f"gradient of input {i}"] = given.grad
        return {**seen, **state(model)}

    same(script, calls=4)


@pytest.mark.parametrize("path", [0, 2])
def test_freezing_in_the_middle(path: int, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {"before": torch.stack(train(model, 2))}
        frozen = model.get_submodule(f"paths.{path}")
        frozen.requires_grad_(False)
        model.zero_grad()
        seen["frozen"] = torch.stack(train(model, 3, start=2))
        seen |= {f"frozen, {n}": value for n, value in state(model).items()}
        frozen.requires_grad_(True)
        seen["after"] = torch.stack(train(model, 3, start=5))
        return {**seen, **state(model)}

    same(script, calls=12)


@pytest.mark.parametrize("name", ["paths.0.3.weight", "paths.2.3.weight", "trunk.weight"])
def test_weight_changed_before_backward(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        given = x().requires_grad_()
        loss = sum_of(model(given))
        with torch.no_grad():
            parameter(model, name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script)


def test_gradient_penalty(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            output = model(given)
            (slope,) = torch.autograd.grad(output.sum(), given, create_graph=True)
            (sum_of(output) + slope.norm(dim=1).sub(1).square().sum()).backward()
            seen |= {f"slope {i}": slope.detach(), f"gradient of input {i}": given.grad}
        return {**seen, **state(model)}

    same(script, calls=4)


def test_second_derivatives_of_parameters(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        some = [parameter(model, FIRST), parameter(model, LAST)]
        first = torch.autograd.grad(sum_of(model(x())), some, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), some)  # type: ignore[arg-type]
        return {**{f"first {i}": g.detach() for i, g in enumerate(first)}, "0": second[0], "1": second[1]}

    same(script)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str, nothing_kept: None) -> None:
    class Inside(Three):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    def script(model: nn.Module) -> Seen:
        model = model.float()
        losses = []
        for i in range(4):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
                output = model(x(i).float())
            assert output.dtype is torch.bfloat16
            sum_of(output.float()).backward()
            losses.append(output.detach().float())
        return {"outputs": torch.stack(losses), **gradients(model)}

    same(script, make=Three if where == "outside" else Inside, calls=4)


def test_train_and_eval_by_part(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {"before": torch.stack(train(model, 2))}
        model.get_submodule("paths.1").eval()
        seen["one in eval mode"] = torch.stack(train(model, 3))
        return {**seen, **state(model)}

    same(script, calls=6)


def test_global_flags_travel(nothing_kept: None) -> None:
    """Under deterministic algorithms fresh memory is filled with NaN: seen from the branches themselves."""

    class Fresh(Three):
        def forward(self, x: Tensor) -> Tensor:
            found = [path(x) + torch.empty(4, dtype=x.dtype).isnan().to(x.dtype) for path in self.paths]
            return self.head(torch.cat(found, 1))

    def script(model: nn.Module) -> Seen:
        torch.use_deterministic_algorithms(True)
        try:
            return {f"deterministic {i}": model(x()).detach() for i in range(3)}
        finally:
            torch.use_deterministic_algorithms(False)

    same(script, make=Fresh, calls=4)


def test_state_dict_as_before() -> None:
    """Names, aliases and the size on disk stay what they were when the parameters are shared with the workers."""

    class Tied(Three):
        def __init__(self) -> None:
            super().__init__()
            self.paths[1][3].weight = self.paths[2][3].weight
            flat = torch.randn(60)
            self.paths[1][0].weight.data = flat[:48].view(8, 6)
            self.paths[1][0].bias.data = flat[48:56]

    model = Tied()
    size = len(saved(model))
    on_lanes(model, 2)
    names = list(model.state_dict())
    for _ in range(3):
        model(x().float()).sum().backward()
    assert list(model.state_dict()) == names
    assert len(saved(model)) == size
    assert model.paths[1][3].weight.data_ptr() == model.paths[2][3].weight.data_ptr()
    weight, bias = model.paths[1][0].weight, model.paths[1][0].bias
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    restored = torch.load(io.BytesIO(saved(model)))
    for name, value in model.state_dict().items():
        assert torch.equal(restored[name], value)


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_data_replaced(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        parameter(model, name).data = torch.full((8, 6), 0.25, dtype=torch.float64)
        losses += train(model, 3)
        model.load_state_dict({n: value * 0.5 for n, value in model.state_dict().items()})
        losses += train(model, 3)
        model.load_state_dict({n: value * 0.5 for n, value in model.state_dict().items()}, assign=True)
        return {"losses": torch.stack(losses + train(model, 3)), **state(model)}

    same(script, calls=10)


def test_batch_sizes(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i, rows in enumerate([5, 3, 7, 4, 5, 3, 7, 4, 2]):
            sum_of(model(x(i, rows))).backward()
            seen[f"step {i}"] = parameter(model, LAST).grad.clone()  # type: ignore[union-attr]
        return {**seen, **state(model)}

    same(script, calls=8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i in range(3):
            given = x(i).requires_grad_()
            sum_of(checkpoint(model, given, use_reentrant=reentrant)).backward()
            seen[f"gradient of input {i}"] = given.grad
        return {**seen, **state(model)}

    same(script, calls=0 if not reentrant else 4)


def test_kept_tensors_stay(nothing_kept: None) -> None:
    """Gradients and outputs that a script keeps are its own: later steps do not write into them."""
    model = on_lanes(Heads().double(), 2)
    warm_up(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(6):
        model.zero_grad()
        outputs = model(x(i))
        sum_of(outputs).backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        kept += [(tensor.detach(), tensor.detach().clone()) for tensor in (*outputs.values(), *found)]
    for tensor, value in kept:
        assert torch.equal(tensor, value)


def test_optimizer_on_copies(nothing_kept: None) -> None:
    """A deep copy of a compiled model, as for a moving average, is a model of its own."""

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        average = copy.deepcopy(model)
        for p in average.parameters():
            p.data.mul_(0.5)
        losses += [*train(average, 3), *train(model, 3)]
        return {
            "losses": torch.stack(losses),
            **state(model),
            **{f"average {n}": v for n, v in state(average).items()},
        }

    same(script, calls=10)


def test_models_in_turn(nothing_kept: None) -> None:
    """A generator and its critic: one's output is the other's input."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = Three(), Three()
            self.generator.head = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.critic(self.generator(x))

    def script(model: nn.Module) -> Seen:
        losses = []
        for i in range(3):
            fake = model.get_submodule("generator")(x(i))
            losses.append(sum_of(model.get_submodule("critic")(fake.detach())))
            losses[-1].backward()
            losses.append(sum_of(model(x(i))))
            losses[-1].backward()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Pair, calls=6)


def test_training_in_a_thread(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        losses: list[Tensor] = []
        thread = threading.Thread(target=lambda: losses.extend(train(model, 4)))
        thread.start()
        thread.join(60)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=6)


def test_graph_break_between_regions(nothing_kept: None) -> None:
    class Broken(Three):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return torch.cat([path(x.repeat(1, 3)) for path in self.paths], 1)

    def script(model: nn.Module) -> Seen:
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script, make=Broken, calls=10)


class LateReader(Three):
    """A branch of one region is read again after the next region: detached, or without gradients at all."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.paths[0](x), self.paths[2](x)
        joined = torch.tanh(first + second)
        third, fourth = self.more[0](joined), self.more[1](joined)
        late = first.detach() * second.detach() if self.detach else first * second
        return torch.tanh(third + fourth) + late


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_outputs_that_are_read_late(mode: Any, detach: bool, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        with mode():
            return {f"output {i}": model(x(i)).detach().clone() for i in range(5)}

    same(script, make=lambda: LateReader(detach), calls=6)


class TwoEnds(nn.Module):
    """A worker's output that is saved by an op of the lead, on the way to a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (path(x) for path in self.paths)
        return (a + b + c).sum(), torch.addcmul(a, b * c, self.weight).sum()


def test_two_outputs_differentiated_apart(workers: Coordinator) -> None:
    """What autograd still holds of a worker's output stays as it was while later steps run."""
    torch.manual_seed(0)
    plain = TwoEnds().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for _ in range(4):
        x, later = torch.randn(4, 6).double(), torch.randn(4, 6).double()
        seen = []
        for model in (plain, fast):
            _, second = model(x)
            first, _ = model(x)
            first.backward()
            model(later)
            seen.append(torch.autograd.grad(second, [model.weight])[0])
        torch.testing.assert_close(seen[1], seen[0])


def test_newer_precision_settings(workers: Coordinator) -> None:
    """torch refuses to read the older settings once the newer ones are in use: a step must not need them."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    fast = on_lanes(Three(), 2)
    try:
        settings.fp32_precision = "tf32"
        for _ in range(3):
            fast(torch.randn(5, 6)).sum().backward()
    finally:
        settings.fp32_precision = before
