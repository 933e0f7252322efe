"""`--verify N`: right networks pass and train as without it; what is wrong on lanes is found, named, and ends it."""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pool
import pytest
import torch
from networks import SMALL, Heads, Three
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transparency import TOLERANCE, assert_same, assert_transparent, on_lanes, trained

from mpsrun import config
from mpsrun.device.arena import Room
from mpsrun.graph.effects import analyze
from mpsrun.run import forkjoin, report, verify
from mpsrun.run import state as modes
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.crossing import Share
from mpsrun.run.deviation import FLOAT32, FLOAT64, HALF, TF32, compare, tolerance
from mpsrun.run.gates import Gates
from mpsrun.run.plainrun import PlainRun
from mpsrun.wire import messages as m

STEPS = 2
Seen = dict[str, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _verifying(workers: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled in a test is verified; every line of --verbose is written."""
    pool.verify_steps(workers, STEPS, monkeypatch)


def lines(capfd: Capture) -> list[str]:
    """What mpsrun has said since the last time about verifying."""
    return [line for line in capfd.readouterr().err.splitlines() if "verified" in line]


def lines_at_the_end(capfd: Capture) -> list[str]:
    """The one-line results, which are written without --verbose, too."""
    return [line for line in lines(capfd) if "of a network" in line]


# ---- what is right passes


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("residual chain", "recurrent")])
def test_right_networks_pass(capfd: Capture, name: str) -> None:
    case = SMALL[name]
    options = {"used": case.used, "forward_only": case.forward_only}
    assert_transparent(case.model, case.inputs, 2, case.regions, **options)  # type: ignore[arg-type]
    (line,) = lines_at_the_end(capfd)
    assert line.startswith(f"mpsrun: verified {STEPS} steps of a network: ")


def x(seed: int = 0) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> Seen:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def several_forwards(model: nn.Module) -> Seen:
    given = x(3).requires_grad_()
    (model(x(1)) * model(given) + model(x(2))).sum().backward()
    return {**gradients(model), "input": given.grad}


def one_forward_without_backward(model: nn.Module) -> Seen:
    kept = model(x(1))
    model(x(2)).square().sum().backward()
    return {**gradients(model), "kept": kept.detach()}


def retained(model: nn.Module) -> Seen:
    loss = model(x()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def one_parameter(model: nn.Module) -> Seen:
    output = model(x()).square().sum()
    names = ["paths.0.0.weight", "paths.1.0.weight", "paths.2.3.bias"]
    parameters = dict(model.named_parameters())
    return {name: torch.autograd.grad(output, parameters[name], retain_graph=True)[0] for name in names}


def twice_differentiable(model: nn.Module) -> Seen:
    given = x().requires_grad_()
    (first,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
    first.square().sum().backward()
    return {**gradients(model), "input": given.grad}


def written_output(model: nn.Module) -> Seen:
    output = model(x())
    output.mul_(3).relu_()
    output.square().sum().backward()
    return {**gradients(model), "output": output.detach()}


def hooked(model: nn.Module) -> Seen:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.mul_(2))
    model(x()).sum().backward()
    return gradients(model)


def stepping_in_backward(model: nn.Module) -> Seen:
    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    model(x()).square().sum().backward()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def evaluated(model: nn.Module) -> Seen:
    model.eval()
    seen = {}
    for i, mode in enumerate([torch.no_grad, torch.inference_mode] * 2):
        with mode():
            seen[str(i)] = model(x(i)).clone()
    return seen


def checkpointed(model: nn.Module) -> Seen:
    for reentrant in (True, False):
        checkpoint(model, x().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    return gradients(model)


def in_autocast(model: nn.Module) -> Seen:
    model.float()
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x(seed).float()) + model(x(seed + 1).float())
        output.float().square().sum().backward()
    return {name: p.grad is not None for name, p in model.named_parameters()}


SCRIPTS: list[Callable[[nn.Module], Seen]] = [
    several_forwards, one_forward_without_backward, retained, one_parameter, twice_differentiable, written_output,
    hooked, stepping_in_backward, evaluated, checkpointed, in_autocast,
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_habits(capfd: Capture, script: Callable[[nn.Module], Seen]) -> None:
    plain = Three().double()
    fast = prepared(copy.deepcopy(plain))
    plain(x()), plain(x())  # as many calls: running averages
    assert_same(script(fast), script(plain), script.__name__, TOLERANCE)
    assert [line for line in lines(capfd) if "verified outputs and buffers" in line]


def prepared(model: nn.Module) -> nn.Module:
    """On lanes, with nothing verified yet that counts: the first call looks, the second one drops its result."""
    fast = on_lanes(model, 2)
    fast(x()), fast(x())
    return fast


def test_heads_differentiated_one_by_one(capfd: Capture) -> None:
    plain = Heads().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for _ in range(3):
        for model in (plain, fast):
            hooks = [p.register_hook(lambda gradient: gradient * 2) for p in model.heads.parameters()]
            model.zero_grad()
            outputs = model(x())
            outputs["b"].square().sum().backward(retain_graph=True)
            outputs["a"].sum().backward()
            for hook in hooks:
                hook.remove()
        assert_same(gradients(fast), gradients(plain), "heads", TOLERANCE)
        assert all(p.grad is None for p in fast.heads["c"].parameters())
    assert len([line for line in lines(capfd) if "verified gradients" in line]) == 2 * STEPS


def test_disjoint_heads_need_no_retained_graph() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    plain = Apart().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for _ in range(3):
        for model in (plain, fast):
            for output in model(x()):
                output.square().sum().backward()
    assert_same(gradients(fast), gradients(plain), "heads", TOLERANCE)


class Chunks(nn.Module):
    """Outputs that share a storage, with or without a common entry; one output is the input itself, if asked for."""

    def __init__(self, overlapping: bool = False, with_input: bool = False) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.overlapping, self.with_input = overlapping, with_input

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack([path(x) for path in self.paths]).sum(0)
        parts = (total, total[:, :2]) if self.overlapping else total.chunk(2, 1)
        return (*parts, x.view(-1)) if self.with_input else parts


@pytest.mark.parametrize("with_input", [False, True], ids=["alone", "with the input"])
@pytest.mark.parametrize("overlapping", [False, True], ids=["apart", "overlapping"])
def test_outputs_that_share_memory(capfd: Capture, overlapping: bool, with_input: bool) -> None:
    plain = Chunks(overlapping, with_input).double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for _ in range(3):
        found, wanted = (written_after(model, overlapping) for model in (fast, plain))
        assert_same(found, wanted, "chunks", TOLERANCE)
    said = lines(capfd)
    unverified = overlapping or with_input
    assert any("not verified: gradients" in line for line in said) == unverified
    assert any("verified gradients of step" in line for line in said) == (not unverified)


def written_after(model: nn.Module, write: bool) -> Seen:
    """Where outputs overlap, writing to one of them changes the history of the other one's gradient."""
    model.zero_grad()
    given = x().requires_grad_()
    first, second, *rest = model(given * 1)
    if write:
        first.mul_(torch.arange(6))
    sum((output.square().sum() for output in (first, second, *rest)), torch.zeros(())).backward()
    return {**gradients(model), "input": given.grad, "second": second.detach()}


def test_an_input_that_is_written() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.paths = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            y = torch.stack([path(x.mul_(2)).tanh() if i == 0 else path(x).tanh() for i, path in enumerate(self.paths)])
            total[1:].add_(y.detach().sum(0).sum())
            return y.prod(0)

    plain = Written().double()
    fast = on_lanes(copy.deepcopy(plain), 2)
    for seed in range(4):
        seen = []
        for model in (fast, plain):
            model.zero_grad()
            given, total = x(seed), torch.zeros(6, 3, dtype=torch.float64)
            model(given[1:], total[2:]).sum().backward()
            seen.append({**gradients(model), "given": given, "total": total})
        assert_same(*seen, f"step {seed}", TOLERANCE)


def test_weights_changed_between_forward_and_backward_raise() -> None:
    fast = prepared(Three().double())
    loss = fast(x()).sum()
    with torch.no_grad():
        fast.paths[2][3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_is_equal_to_the_bit(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL["pathnet"]
    torch.manual_seed(0)
    verified = trained(case.model().double())
    unverified = copy.deepcopy(verified)
    batches = [tuple(value.double() for value in case.inputs()) for _ in range(STEPS + 3)]
    on_lanes(verified.model, 2)
    found = [verified.step(inputs, step) for step, inputs in enumerate(batches)]
    assert len(lines_at_the_end(capfd)) == 1
    torch._dynamo.reset()  # a graph belongs to all networks of its kind
    settings = dataclasses.replace(config.current(), verify=0)
    monkeypatch.setattr(config, "current", lambda: settings)
    on_lanes(unverified.model, 2)
    for step, inputs in enumerate(batches):
        assert_same(found[step], unverified.step(inputs, step), f"step {step}", {"rtol": 0, "atol": 0})
    assert lines_at_the_end(capfd) == []


def test_workers_are_told_of_the_scripts_own_parameters(workers: Coordinator) -> None:
    others = shares_of(workers)  # of networks that nobody has collected yet
    model = prepared(Three().double())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model(x()).sum().backward()  # verified, and the workers have to be told where parameters are now
    gc.collect()
    shares = [share for share in shares_of(workers) if not any(share is other for other in others)]
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert shares
    assert all(id(tensor()) in known for share in shares for tensor in share.statics.values())


def shares_of(workers: Coordinator) -> list[Share]:
    return [share for share in gc.get_objects() if type(share) is Share and share.link in workers.links]


def test_parts_that_were_not_asked_for_can_be_asked_for_next() -> None:
    model = on_lanes(Chunks().double(), 2)
    for _ in range(3):
        first, second = model(x())
        loss = first.sum() + second.sum()
        (graph,) = report.graphs
        (region,) = graph.regions
        for lane in (0, 1):  # without a retained graph: the two have nothing in common that is saved
            branch = region.lanes.index(lane)
            (gradient,) = torch.autograd.grad(loss, model.paths[branch][0].weight)
            assert gradient.abs().sum() > 0


def graph_that_writes(argument: Tensor) -> fx.GraphModule:
    """Adds an argument to a constant of the graph, and the other way round; then waits for other processes."""
    root = nn.Module()
    root.register_buffer("constant", torch.ones(2, 2))
    graph = fx.Graph()
    given = graph.placeholder("given")
    given.meta["example_value"] = argument
    constant = graph.get_attr("constant")
    graph.call_method("add_", (constant, 1))
    graph.call_method("mul_", (given, 2))
    graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (given,))
    graph.output((given,))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    ("argument", "erased", "reason"),
    [
        (torch.ones(2, 2), [], "the constant constant is written"),
        (torch.ones(2, 2), ["add_"], "wait_tensor_default speaks to other processes"),
        (torch.eye(2).to_sparse(), ["add_", "wait_tensor"], "given is a sparse tensor or of a tensor subclass"),
        (torch.ones(2, 2), ["add_", "wait_tensor"], None),
    ],
    ids=["constant", "collective", "sparse", "ordinary"],
)
def test_graphs_that_cannot_be_run_twice(argument: Tensor, erased: list[str], reason: str | None) -> None:
    gm = graph_that_writes(argument)
    for node in list(gm.graph.nodes):
        if any(word in str(node.target) for word in erased):
            gm.graph.erase_node(node)
    assert PlainRun(gm, analyze(gm), "cpu").refusal == reason


# ---- when it is done, and what it costs


def test_each_plan_is_verified_anew(capfd: Capture, workers: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_lanes(Three().double(), 2)
    for _ in range(STEPS + 3):
        model(x()).sum().backward()
    assert len(lines_at_the_end(capfd)) == 1
    monkeypatch.setattr(workers._watcher, "epoch", workers._watcher.epoch + 1)  # as when a worker is lost
    for _ in range(STEPS + 3):
        model(x()).sum().backward()
    assert len(lines_at_the_end(capfd)) == 1


def test_steps_that_were_not_all_done_are_told_at_the_end(capfd: Capture) -> None:
    model = prepared(Three().double())
    assert lines_at_the_end(capfd) == []
    verify.say_rest()
    assert lines_at_the_end(capfd) == ["mpsrun: verified 1 step of a network, without gradients: no deviation"]
    del model


def test_nothing_on_lanes_is_told_at_the_end(capfd: Capture) -> None:
    verify.say_rest()
    (line,) = lines(capfd)
    assert "ran on lanes, so nothing was verified" in line


def test_memory_is_given_back_without_the_collector() -> None:
    model = trained(on_lanes(Three().double(), 2))
    model.step((x(),), 0)
    gc.collect()
    gc.disable()
    try:
        counts = []
        for step in range(STEPS + 3):
            model.step((x(step),), step)
            found = gc.get_objects()
            counts.append(sum(type(value) is Tensor for value in found))
            assert not any(type(value) is Gates for value in found), step
            del found
        assert counts[STEPS:] == counts[STEPS:][:1] * 3
    finally:
        gc.enable()


# ---- what is wrong is found


def wrong_output(patch: pytest.MonkeyPatch) -> None:
    take = forkjoin._take
    patch.setattr(forkjoin, "_take", lambda invocation: tuple(output + 1e-3 for output in take(invocation)))


def wrong_buffer(patch: pytest.MonkeyPatch) -> None:
    spoil(patch, "writes", lambda view: view.add_(1) if view.is_floating_point() else view)


def wrong_counter(patch: pytest.MonkeyPatch) -> None:
    spoil(patch, "writes", lambda view: view if view.is_floating_point() else view.add_(1))


def wrong_gradient(patch: pytest.MonkeyPatch) -> None:
    spoil(patch, "flats", lambda view: view.mul_(1.01))


def gradient_of_nothing(patch: pytest.MonkeyPatch) -> None:
    spoil(patch, "flats", lambda view: view.fill_(torch.nan))


def missing_gradient(patch: pytest.MonkeyPatch) -> None:
    collect = forkjoin._collect
    patch.setattr(forkjoin, "_collect", lambda *args: [None for _ in collect(*args)])


def random_draw(patch: pytest.MonkeyPatch) -> None:
    take = forkjoin._take
    patch.setattr(forkjoin, "_take", lambda invocation: (torch.rand(1), take(invocation))[1])


def spoil(patch: pytest.MonkeyPatch, wrong_part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Have what the workers left in their slots changed before the lead reads it."""
    tensors = Room.tensors

    def spoiled(self: Room, key: int, part: str, refs: Any) -> list[Tensor]:
        views = tensors(self, key, part, refs)
        if part == wrong_part:
            with torch.no_grad():
                [change(view) for view in views]
        return views

    patch.setattr(Room, "tensors", spoiled)


FAULTS = [
    (wrong_output, "outputs and buffers", "output", "0"),
    (wrong_buffer, "outputs and buffers", "buffer", "paths.{}.1.running_mean"),
    (wrong_counter, "outputs and buffers", "buffer", "paths.{}.1.num_batches_tracked"),
    (wrong_gradient, "gradients", "gradient", "paths.{}.3.weight"),
    (gradient_of_nothing, "gradients", "gradient", "paths.{}.1.bias"),
    (missing_gradient, "gradients", "gradient", "paths.{}.0.weight"),
    (random_draw, "outputs and buffers", "random generator", "cpu"),
]


@pytest.mark.parametrize(("fault", "what", "kind", "name"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_faults(
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    what: str,
    kind: str,
    name: str,
) -> None:
    model = trained(on_lanes(Three().double(), 2))
    model.step((x(),), 0)
    (graph,) = report.graphs
    capfd.readouterr()
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(SystemExit) as end:
            model.step((x(),), 1)
    assert end.value.code == 4
    text = capfd.readouterr().err
    assert f"found other {what} of step 1 of {STEPS}" in text
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert {row[1] for row in table} == {kind}
    lanes = [lane for region in graph.regions for lane in region.lanes]
    told = {row[0] for row in table}
    for i, lane in enumerate(lanes):
        assert name.format(i) in told or (lane == 0 and "{}" in name), (i, lane, told)
    verify.say_rest()
    assert lines(capfd) == []  # no word of what agreed


def test_a_fault_in_a_later_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(Three().double())
    losses = [model(x(seed)).sum() for seed in range(3)]
    losses[1].backward()
    wrong_gradient(monkeypatch)
    with pytest.raises(SystemExit):
        losses[0].backward()


# ---- deviations


def deviation(found: Any, wanted: Any, kind: str = "output") -> float:
    return compare(kind, [("0", found, wanted)], FLOAT32)[0].size


def test_deviations() -> None:
    nan, inf = torch.nan, torch.inf
    a = torch.tensor([1.0, nan, inf, -4.0])
    assert deviation(a, a.clone()) == 0
    assert deviation(torch.tensor([1.0, nan, inf, -3.0]), a) == 0.25
    for other in ([nan, nan, inf, -4.0], [1.0, 2.0, inf, -4.0], [1.0, nan, -inf, -4.0]):
        assert deviation(torch.tensor(other), a) == inf
    assert deviation(torch.zeros(2), torch.zeros(2)) == 0
    assert deviation(torch.ones(2), torch.zeros(2)) == inf
    assert deviation(torch.ones(2), torch.ones(3)) == deviation(torch.ones(2), torch.ones(2).double()) == inf
    assert deviation(None, None) == deviation(3, 3) == deviation(torch.empty(0), torch.empty(0)) == 0
    assert deviation(None, torch.zeros(2)) == deviation(3, 4) == inf
    assert deviation(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert deviation(torch.tensor([1, 2]), torch.tensor([1, 3])) == inf
    assert deviation(torch.eye(2).to_sparse(), torch.eye(2)) == 0
    assert deviation(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])) > 1


def test_small_tensors_are_measured_against_the_largest_of_their_kind() -> None:
    large, small = torch.tensor([1.0]), torch.tensor([1e-9])
    found = compare("gradient", [("a", large, large), ("b", small, -small)], FLOAT32)
    assert found[1].size == pytest.approx(2e-9 / FLOAT32.gradient_floor)
    assert not found[1].is_excess


def test_tolerances(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tolerance([torch.float64, torch.int32], "cpu") is FLOAT64
    assert tolerance([torch.float64, torch.complex64], "cpu") is FLOAT32
    assert tolerance([torch.float32, torch.bfloat16], "cpu") is HALF
    with torch.autocast("cpu", torch.float16):
        assert tolerance([torch.float32], "cpu") is HALF
    for name, found in (("tf32", TF32), ("bf16", HALF), ("ieee", FLOAT32)):
        settings = m.Flags((("generic.all", "none"), ("mkldnn.matmul", "ieee"), ("cuda.conv", name)))
        monkeypatch.setattr(modes, "flags", lambda settings=settings: settings)
        assert tolerance([torch.float32], "cuda") is found
        assert tolerance([torch.float32], "cpu") is FLOAT32


def test_a_step_that_overflows_is_left_to_the_grad_scaler() -> None:
    one, inf = torch.ones(2), torch.full((2,), torch.inf)
    assert verify._overflow([(one, one), (inf, one), (one, inf)])
    assert not verify._overflow([(one, one), (inf, one)])
    assert not verify._overflow([])
