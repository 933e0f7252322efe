"""`Branches`, with all of them and with sets chosen per call: the results of a loop over the modules."""

import copy
import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pool
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transparency import TOLERANCE, assert_same

import mpsrun
from mpsrun.errors import UsageError
from mpsrun.run import report
from mpsrun.run.coordinator import Coordinator

Seen = dict[str, Any]
COUNT = 5
SETS = [
    (0, 3),
    (3, 0),
    (1, 2, 4),
    (4, 2),
    (0, 1, 2, 3, 4),
    (2,),
    (0, 4),
    (3, 1),
    (2, 3, 4),
    (1, 4),
    (0, 1, 3),
    (4, 0, 2),
]

pytestmark = pytest.mark.usefixtures("workers")


def path(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6))


def paths() -> list[nn.Module]:
    return [path(8 + i) for i in range(COUNT)]


class Loop(nn.ModuleList):
    """What `Branches` stands for."""

    def __init__(self, modules: Iterable[nn.Module], join: Any) -> None:
        super().__init__(modules)
        self.join = join

    def forward(self, x: Any, active: Iterable[int] | None = None) -> Any:
        outputs = [self[i](x) for i in (range(len(self)) if active is None else active)]
        if self.join == "cat":
            return torch.cat(outputs, 1)
        return sum(outputs[1:], start=outputs[0]) if self.join == "sum" else self.join(outputs)


def same(
    script: Callable[[nn.Module], Seen],
    make: Callable[[], list[nn.Module]] = paths,
    join: Any = "sum",
    around: Callable[[nn.Module], nn.Module] = lambda branches: branches,
    calls: int = 1,
) -> None:
    """A script sees the same with `Branches` as with a loop, and workers run at least so many forwards for it."""
    torch.manual_seed(0)
    modules = [module.double() for module in make()]
    plain, fast = around(Loop(copy.deepcopy(modules), join)), around(mpsrun.Branches(modules, join))
    for model in (plain, fast):
        warm_up(model)
    before = executed()
    torch.manual_seed(1)
    wanted = script(plain)
    torch.manual_seed(1)
    found = script(fast)
    assert_same(found, wanted, "at the end", TOLERANCE)
    assert executed() - before >= calls


def warm_up(model: nn.Module) -> None:
    torch.manual_seed(0)
    for _ in range(2):
        model(x(), active=range(COUNT)).sum().backward()
    model.zero_grad()


def x(seed: int = 0, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator)


def executed() -> int:
    coordinator = pool.current()
    assert coordinator is not None
    return sum(sum(counts.forwards.values()) for counts in coordinator.counts().values())


def state(model: nn.Module) -> Seen:
    gradients = {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {**{n: value.clone() for n, value in model.state_dict().items()}, **gradients}


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(model: nn.Module, sets: Iterable[Iterable[int] | None]) -> Seen:
    """One step of SGD for each set; the gradients of each step, and the state at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen: Seen = {}
    for step, active in enumerate(sets):
        optimizer.zero_grad()
        output = model(x(step), active=active)
        output.square().sum().backward()
        seen |= {f"output {step}": output.detach(), **{f"{step}: {n}": value for n, value in state(model).items()}}
        optimizer.step()
    return seen | state(model)


def joined(outputs: list[Tensor]) -> Tensor:
    """Depends on the order of the outputs."""
    return sum((output * (i + 1) for i, output in enumerate(outputs)), start=torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("join", ["cat", "sum", joined])
def test_all_branches(join: Any) -> None:
    same(lambda model: train(model, [None] * 4), join=join, calls=3 * (COUNT - 1))


@pytest.mark.parametrize("join", ["cat", "sum", joined])
def test_sets(join: Any) -> None:
    same(lambda model: train(model, SETS), join=join, calls=sum(len(active) - 1 for active in SETS))


def test_no_set_is_compiled_by_itself(workers: Coordinator) -> None:
    branches = mpsrun.Branches(paths()).double()
    start = compiled_graphs()
    warm_up(branches)
    compiled, before = compiled_graphs(), executed()
    assert compiled - start == COUNT
    for active in SETS:
        branches(x(), active=active).sum().backward()
    assert compiled_graphs() == compiled
    assert executed() - before == sum(len(active) - 1 for active in SETS)  # the lead keeps one branch of each set
    (graph,) = [graph for graph in report.graphs if graph.regions and graph.regions[0].name.kind == "Branches"][-1:]
    told = {worker: counts.backwards for worker, counts in workers.counts().items()}
    for line in graph.regions:
        if line.lanes[0]:
            assert told[line.lanes[0]][line.jobs[0]] == line.calls


def test_many_branches_of_one_class_are_compiled_once_each() -> None:
    """More of them than Dynamo compiles variants of one function."""
    branches = mpsrun.Branches([nn.Linear(6, 6) for _ in range(12)]).double()
    before = compiled_graphs()
    for _ in range(3):
        branches(x(), active=range(12))
    assert compiled_graphs() - before == 12


def test_skipped_branches_are_not_touched() -> None:
    branches = mpsrun.Branches(paths()).double()
    warm_up(branches)
    fired: list[str] = []
    before = copy.deepcopy(branches.state_dict())
    for name, parameter in branches.named_parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    for i, branch in enumerate(branches):
        branch.register_forward_hook(lambda *_, i=i: fired.append(f"forward {i}"))
    branches(x(1), active=[3, 1]).sum().backward()
    assert {name for name in fired if name.startswith("forward")} == {"forward 1", "forward 3"}
    for name, parameter in branches.named_parameters():
        assert (parameter.grad is None) == (name[0] not in "13") == (name not in fired)
    for name, value in branches.state_dict().items():
        assert torch.equal(value, before[name]) == (name[0] not in "13" or name.endswith(("weight", "bias")))


def test_several_sets_before_one_backward() -> None:
    def script(model: nn.Module) -> Seen:
        outputs = [model(x(i), active=active) for i, active in enumerate(SETS[:5])]
        torch.stack(outputs).square().sum().backward()
        return state(model)

    same(script, calls=8)


def test_retain_graph_and_gradient_of_the_input() -> None:
    def script(model: nn.Module) -> Seen:
        given = x().requires_grad_()
        model(given, active=[4, 1, 2])  # the first input that requires a gradient is another graph
        loss = model(given, active=[4, 1, 2]).square().sum()
        loss.backward(retain_graph=True)
        first = state(model)
        loss.backward()
        return {**{f"first {n}": value for n, value in first.items()}, **state(model), "x": given.grad}

    same(script)


def test_gradient_of_one_parameter_and_of_gradients() -> None:
    def script(model: nn.Module) -> Seen:
        wanted = [p for n, p in model.named_parameters() if n.startswith("4.")]
        slopes = torch.autograd.grad(model(x(), active=[0, 4]).square().sum(), wanted, create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()  # type: ignore[union-attr]
        return state(model)

    same(script)


def test_without_gradients_and_in_eval_mode() -> None:
    def script(model: nn.Module) -> Seen:
        seen = train(model, SETS[:3])
        model.eval()
        with torch.no_grad():
            seen |= {f"evaluated {i}": model(x(i), active=active) for i, active in enumerate([*SETS, *SETS])}
        model.train()
        return {**seen, **train(model, SETS[3:6])}

    same(script, calls=30)


def test_sizes_that_change() -> None:
    def script(model: nn.Module) -> Seen:
        return {f"{i}": model(x(rows=rows), active=[1, 3, 2]) for i, rows in enumerate((4, 7, 5, 4, 9, 7, 9, 12))}

    same(script, calls=6)


def test_checkpointing() -> None:
    def script(model: nn.Module) -> Seen:
        for i, active in enumerate(SETS[:4]):
            given = x(i).requires_grad_()
            checkpoint(
                lambda given, active=active: model(given, active=active), given, use_reentrant=False
            ).sum().backward()
        return {**state(model), **train(model, SETS[:2])}

    same(script)


def test_branches_that_are_replaced_and_added() -> None:
    def script(model: nn.Module) -> Seen:
        seen = train(model, SETS[:3])
        torch.manual_seed(3)
        model[3] = path(20).double()  # type: ignore[operator]
        model.append(path(4).double())  # type: ignore[operator]
        return {**seen, **train(model, [(3, 0), (5, 3, 1), (3, 5), (3, 5, 2)])}

    same(script, calls=4)


class Structured(nn.Module):
    """Hands out a dict of tensors, its own input and a number, and leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.last = self.one(x)
        return {"both": (self.one(x), self.two(x)), "x": x, "n": 3}


def test_outputs_of_any_form() -> None:
    branches = mpsrun.Branches([Structured() for _ in range(COUNT)], join=list).double()
    before = executed()
    for i in range(4):
        outputs = branches(x(i), active=[2, 0, 3])
        for output, number in zip(outputs, (2, 0, 3), strict=True):
            wanted = branches[number].one(x(i)), branches[number].two(x(i))
            torch.testing.assert_close(output, {"both": wanted, "x": x(i), "n": 3}, **TOLERANCE)
            assert torch.equal(output["both"][0], branches[number].last)
    assert branches[1].last is None
    assert executed() - before == 6


class Counts(nn.Module):
    """Dynamo compiles it anew for each number of calls, and gives up."""

    def __init__(self, total: list[int]) -> None:
        super().__init__()
        self.linear, self.own, self.total = nn.Linear(6, 6), 0, total

    def forward(self, x: Tensor) -> Tensor:
        self.own += 1
        self.total.append(self.own)
        return self.linear(x) * self.own


class Reads(Counts):
    """Depends on what the branches before it have left."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.total)


def test_branches_that_count_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpsrun.run.branches.STATES", 8)
    branches = mpsrun.Branches([Counts([]) for _ in range(3)], join=list).double()
    for i in range(1, 13):
        for output, number in zip(branches(x(), active=[2, 0]), (2, 0), strict=True):
            torch.testing.assert_close(output, branches[number].linear(x()) * i)
    assert [branch.own for branch in branches] == [12, 0, 12]


def test_branches_that_change_each_other() -> None:
    """What one of them leaves for the other in Python cannot be seen beforehand."""
    total: list[int] = []
    branches = mpsrun.Branches([Reads(total) for _ in range(3)], join=list).double()
    with pytest.raises(RuntimeError, match="expected branches that do not depend on each other"):
        branches(x(), active=[2, 0])


def test_dropout_draws_as_in_the_loop() -> None:
    def make() -> list[nn.Module]:
        return [path(), nn.Sequential(nn.Dropout(), path()), path(), nn.Sequential(path(), nn.Dropout(0.2)), path()]

    same(lambda model: train(model, SETS), make=make, calls=8)


def test_branch_that_writes_its_input() -> None:
    """Then the order of the branches counts, and they run one after the other."""

    def make() -> list[nn.Module]:
        return [path(), nn.Sequential(nn.ReLU(inplace=True), path()), path(), path(), nn.Identity()]

    def script(model: nn.Module) -> Seen:
        seen = {}
        with torch.no_grad():
            for active in [(2, 1, 0), (0, 1, 2), (3, 4, 1), (0, 2, 3)]:
                given = x(3)
                seen |= {f"{active}": model(given, active=active), f"x of {active}": given}
        return {**seen, **state(model)}

    torch.manual_seed(0)
    modules = [module.double() for module in make()]
    found, wanted = (script(kind(copy.deepcopy(modules), join="cat")) for kind in (mpsrun.Branches, Loop))
    assert_same(found, wanted, "at the end", TOLERANCE)


def test_branches_that_share_statistics() -> None:
    def make() -> list[nn.Module]:
        shared = nn.BatchNorm1d(6)
        return [nn.Sequential(shared, path()), nn.Sequential(shared, path()), path(), path(), path()]

    same(lambda model: train(model, [*SETS, (0, 1), (0, 2), (2, 3)]), make=make, calls=8)


def test_shared_weights() -> None:
    def make() -> list[nn.Module]:
        shared = nn.Linear(6, 6)
        return [nn.Sequential(shared, path()) for _ in range(COUNT)]

    same(lambda model: train(model, SETS), make=make, calls=8)


class Talks(nn.Module):
    """Dynamo cannot compile it as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x if x.sum().item() > 0 else x * 2


def test_branch_that_cannot_be_compiled() -> None:
    """Sets with it run one after the other, others on lanes as before."""
    same(
        lambda model: train(model, [*SETS, *SETS]),
        make=lambda: [*paths()[:4], Talks()],
        calls=sum(len(active) - 1 for active in SETS if 4 not in active),
    )


def test_error_of_a_branch_is_its_own() -> None:
    branches = mpsrun.Branches(paths()).double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            branches(torch.randn(5, 7, dtype=torch.float64), active=[1, 2])
    before = executed()
    for _ in range(3):
        branches(x(), active=[1, 2])
    assert executed() - before == 2


class Net(nn.Module):
    """A network around `Branches`, as scripts have them."""

    def __init__(self, branches: nn.Module) -> None:
        super().__init__()
        self.stem, self.branches, self.head = nn.Linear(6, 6).double(), branches, nn.Linear(6, 6).double()

    def forward(self, x: Tensor, active: Iterable[int] | None = None) -> Tensor:
        return self.head(self.branches(self.stem(x).relu(), active=active))


@pytest.mark.parametrize("lanes", ["eager", "mpsrun"])
def test_inside_of_a_compiled_network(lanes: str) -> None:
    def around(branches: nn.Module) -> nn.Module:
        torch.manual_seed(2)
        net = Net(branches)
        net.compile(backend=lanes) if isinstance(branches, mpsrun.Branches) else None
        return net

    every = [list(active) for k in (2, 3) for active in itertools.permutations(range(COUNT), k)][::4]
    same(lambda model: train(model, [*SETS, None, *every, None]), around=around, calls=40)
    assert len(every) > torch._dynamo.config.recompile_limit


def test_copied_pickled_and_exported() -> None:
    branches = mpsrun.Branches(paths()).double()
    warm_up(branches)
    file = io.BytesIO()
    torch.save(branches, file)
    file.seek(0)
    branches.eval()
    wanted = branches(x(), active=[4, 2])
    for other in (copy.deepcopy(branches), torch.load(file, weights_only=False).eval()):
        torch.testing.assert_close(other(x(), active=[4, 2]), wanted, **TOLERANCE)
    exported = torch.export.export(branches, (x(),), {"active": [4, 2]}).module()
    torch.testing.assert_close(exported(x(), active=[4, 2]), wanted, **TOLERANCE)


@pytest.mark.parametrize("active", [(3, 1), [3, 1], range(3, 0, -2), np.array([3, 1])])
def test_kinds_of_sequences(active: Any) -> None:
    branches = mpsrun.Branches(paths(), join=list).double().eval()
    for output, wanted in zip(branches(x(), active=active), (branches[3](x()), branches[1](x())), strict=True):
        torch.testing.assert_close(output, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "active",
    [
        *([], [0, 5], [-1, 2], [1, 1], [0.0, 1.0], [True, False, True, False, False], ["0", "1"], 3, "01"),
        *(iter([0, 1]), torch.tensor([0, 1]), [torch.tensor(0), torch.tensor(1)], {0: 1}, {0, 1}),
    ],
)
def test_what_is_no_set_of_branches(active: Any) -> None:
    branches = mpsrun.Branches(paths()).double()
    with pytest.raises(UsageError, match="expected active to be a sequence of different numbers from 0 to 4"):
        branches(x(), active=active)


@pytest.mark.parametrize(("modules", "join"), [([], "sum"), (None, "mean")])
def test_what_is_no_branches(modules: Any, join: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        mpsrun.Branches(paths() if modules is None else modules, join)


def test_branches_that_are_gone_leave_nothing() -> None:
    def use(make: Callable[[], nn.Module]) -> weakref.ref[nn.Module]:
        branches = mpsrun.Branches([make() for _ in range(2)]).double()
        for _ in range(3):
            branches(x(), active=[1, 0]).sum().backward()
        return weakref.ref(branches[0])

    gone = [use(path), use(Talks)]
    gc.collect()
    assert [module() for module in gone] == [None, None]
