"""Networks that are saved, loaded, copied, pickled, exported and traced after training on lanes."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from alike import EPS, Seen, executed, same, state, train, warm_up, x
from networks import Inception, Three, images
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transparency import TOLERANCE

from mpsrun.run import report
from mpsrun.run.in_place import compile_in_place

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")


def saved(what: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def on_lanes(make: Callable[[], nn.Module] = Three) -> nn.Module:
    """A model compiled in place, which has had a step on lanes."""
    model = make().double()
    compile_in_place(model)
    warm_up(model)
    assert report.graphs[-1].calls
    return model


@pytest.mark.parametrize("direction", ["plain to lanes", "lanes to plain"])
def test_training_goes_on_from_a_checkpoint(direction: str) -> None:
    """Half of the steps on one side, half on the other: what all of them are plainly."""

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = Three().double()
        return model, torch.optim.Adam(model.parameters(), 0.01, eps=EPS)

    whole, of_whole = begin()
    wanted = train(whole, 8, optimizer=of_whole)
    model, optimizer = begin()
    if direction == "lanes to plain":
        compile_in_place(model)
    losses = train(model, 4, optimizer=optimizer)
    file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.manual_seed(4)
    model = Three().double()
    if direction == "plain to lanes":
        compile_in_place(model)
    checkpoint = torch.load(file)
    model.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=EPS)
    optimizer.load_state_dict(checkpoint["optimizer"])
    losses += train(model, 4, start=4, optimizer=optimizer)
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), **TOLERANCE)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **TOLERANCE)
    assert sum(graph.calls for graph in report.graphs) >= 2


def test_files_are_no_larger() -> None:
    plain = Three().double()
    warm_up(plain)
    fast = on_lanes()
    assert len(saved(fast.state_dict()).getvalue()) == len(saved(plain.state_dict()).getvalue())
    one, other = torch.optim.Adam(fast.parameters()), torch.optim.Adam(plain.parameters())
    train(fast, 1, optimizer=one), train(plain, 1, optimizer=other)
    assert len(saved(one.state_dict()).getvalue()) == len(saved(other.state_dict()).getvalue())


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deep copy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: torch.load(saved(model), weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    """A copy is trained as the copy of a plain model is, and so is the original then."""
    copied = COPIES[how]

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        other = copied(model)
        losses += [*train(other, 3, start=2), *train(model, 3, start=5), *train(copied(other), 2)]
        return {
            "losses": torch.stack(losses),
            **state(model),
            **{f"of the copy, {n}": v for n, v in state(other).items()},
        }

    same(script, calls=8)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exported_and_traced(mode: str) -> None:
    """What reads a network op by op finds the plain one."""
    model = on_lanes().train(mode == "train")
    plain = copy.deepcopy(model)
    given = x(1)
    wanted = copy.deepcopy(plain)(given)
    for name, run in {
        "export": torch.export.export(model, (given,)).module(),
        "trace": torch.jit.trace(copy.deepcopy(model), (given,), check_trace=False),
        "script": torch.jit.script(model),
        "symbolic trace": torch.fx.symbolic_trace(nn.Sequential(model)),
    }.items():
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(run(given), wanted, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)
    model.load_state_dict(plain.state_dict())
    traced = torch.jit.trace(model, (given,), check_trace=False)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(traced(given), wanted, **TOLERANCE)
    model.load_state_dict(plain.state_dict())
    assert "linear" in str(make_fx(model)(given).graph) or "addmm" in str(make_fx(model)(given).graph)
    before = executed()
    train(model.train(), 2)
    assert executed() > before


def test_traced_images() -> None:
    model = Inception().double().eval()
    compile_in_place(model)
    (given,) = images()
    given = given.double()
    for _ in range(3):
        wanted = model(given)
    assert report.graphs[-1].calls
    torch.testing.assert_close(torch.jit.trace(model, (given,))(given), wanted, **TOLERANCE)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_again_by_the_script(whole: bool) -> None:
    """The script's own compiler sees the network as it is, and is what runs it from then on."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        torch._dynamo.reset()  # else the second model would be given the graphs of the first
        compiled = torch.compile(model, backend=keep, fullgraph=whole)
        losses += train(compiled, 3, start=2)  # type: ignore[arg-type]
        model.compile(backend=keep)
        losses += train(model, 2, start=5)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, calls=2)
    assert graphs
    assert len(graphs) % 2 == 0  # as many of the plain model as of the other
