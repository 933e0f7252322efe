"""Times of branches alone: every branch of every small network, and nothing that a script could notice."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from networks import SMALL, Case
from torch import nn

from mpsrun.graph.effects import analyze, drop_inert
from mpsrun.graph.regions import Regions, find_regions
from mpsrun.plan.cost import MACHINES, Costs
from mpsrun.run import profile
from mpsrun.run.demand import Demand
from mpsrun.run.layout import TensorMeta
from mpsrun.run.observe import Observer
from mpsrun.run.profile import Alone, NotMeasured, Profiler, kernels_us, measured_us

COSTS = Costs(MACHINES["cpu"])


def profiled(model: nn.Module, *inputs: Any) -> list[tuple[Regions, profile.Times]]:
    """The regions of each graph of a call, with the times of their branches."""
    found = []

    def compiler(gm: torch.fx.GraphModule, _example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            drop_inert(gm)
            effects = analyze(gm)
            regions = find_regions(gm, effects)
            observer = Observer(gm, effects, regions.regions)
            result = observer.run(*args)
            values = dict(zip(gm.graph.find_nodes(op="placeholder"), args, strict=True))
            before = state_of(model)
            times = Profiler(effects, observer.observation, values, "cpu").times(regions.regions, COSTS)
            assert same(state_of(model), before)
            found.append((regions, times))
            return result

        return run

    with torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(model, backend=compiler)(*inputs)
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that measuring could move."""
    state = {f"{name}": value.clone() for name, value in model.state_dict().items()}
    state |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    state["versions"] = [value._version for value in model.state_dict(keep_vars=True).values()]
    state["random"] = torch.get_rng_state()
    state["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.regions])
def test_every_branch_is_timed_and_nothing_moves(name: str) -> None:
    case: Case = SMALL[name]
    ((regions, times),) = profiled(case.model(), *case.inputs())
    assert [len(branches) for branches in times.values()] == [len(region.branches) for region in regions.regions]
    for region in regions.regions:
        for branch, alone in zip(region.branches, times[region.index], strict=True):
            if isinstance(alone, NotMeasured):
                assert branch.pinned
            else:
                assert alone.forward_us > 0
                assert alone.us == alone.forward_us + alone.backward_us
    assert any(alone.backward_us > 0 for branches in times.values() for alone in branches if isinstance(alone, Alone))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_backward(mode: Any) -> None:
    case = SMALL["batch norm"]
    model = case.model()
    with mode():
        ((_, times),) = profiled(model, *case.inputs())
    assert all(alone.backward_us == 0 for branches in times.values() for alone in branches)
    assert sorted(measured_us(times)) == sorted(times)


def test_under_autocast_the_callers_casts_are_left_alone() -> None:
    case = SMALL["towers"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((_, times),) = profiled(case.model(), *case.inputs())
    assert all(alone.us > 0 for branches in times.values() for alone in branches)


def test_hooks_of_parameters_are_not_called() -> None:
    case = SMALL["towers"]
    model = case.model()
    for parameter in model.parameters():
        parameter.register_hook(lambda _gradient: pytest.fail("measuring called a hook"))
    profiled(model, *case.inputs())
    assert all(parameter.grad is None for parameter in model.parameters())


class Logs(nn.Module):
    """A branch that only works on some values, and one whose ints pick rows."""

    def __init__(self, last: int = 0) -> None:
        super().__init__()
        self.rows = nn.Embedding(3, 4)
        self.line = nn.Linear(4, 4)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(x)
        picked = self.rows((x * 2 + self.last).long())[..., 0]
        return picked + self.line(x.log())


def test_made_up_values_are_probabilities() -> None:
    ((regions, times),) = profiled(Logs(), torch.randn(3, 4))
    assert len(regions.regions) == 1
    assert all(isinstance(alone, Alone) for alone in times[0])


def test_a_branch_that_raises_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_made_up", lambda meta: torch.full(meta.shape, 99.0))
    ((_, times),) = profiled(Logs(), torch.randn(3, 4))
    (reason,) = (alone.reason for alone in times[0] if isinstance(alone, NotMeasured))
    assert reason.startswith("IndexError: index out of range")
    assert measured_us(times) == {}


def test_nothing_runs_that_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Costs(dataclasses.replace(MACHINES["cpu"], launch_us=1e7))
    monkeypatch.setitem(globals(), "COSTS", slow)
    monkeypatch.setattr(profile, "build", lambda _program: pytest.fail("it ran"))
    case = SMALL["pathnet"]
    ((_, times),) = profiled(case.model(), *case.inputs())
    assert all("would take" in alone.reason for branches in times.values() for alone in branches)


def test_no_branch_starts_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, *[6.0] * 100])
    monkeypatch.setattr(profile.time, "monotonic", lambda: next(moments))
    case = SMALL["pathnet"]
    ((_, times),) = profiled(case.model(), *case.inputs())
    kinds = [type(alone) for branches in times.values() for alone in branches]
    assert kinds == [Alone] + [NotMeasured] * (len(kinds) - 1)


@pytest.mark.parametrize(
    ("shape", "stride", "dtype"),
    [
        ((), (), torch.float32),
        ((0, 3), (3, 1), torch.float32),
        ((4, 3), (0, 1), torch.float16),
        ((3, 4), (1, 3), torch.complex64),
        ((2, 3), (8, 2), torch.float64),
        ((5,), (1,), torch.bool),
        ((2, 2), (2, 1), torch.int64),
    ],
)
def test_made_up_tensors_are_like_those_that_were_seen(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> None:
    wants = dtype.is_floating_point or dtype.is_complex
    meta = TensorMeta(shape, stride, dtype, torch.device("cpu"), wants)
    made = profile._made_up(meta)
    assert TensorMeta.of(made) == meta
    assert made.is_leaf
    values = made.detach().real.double()
    assert bool(((values >= 0) & (values <= 1)).all())
    assert wants or not values.any()


def test_a_model_trains_on_as_if_nothing_had_been_measured() -> None:
    plain = SMALL["batch norm"].model()
    measured = copy.deepcopy(plain)
    inputs = SMALL["batch norm"].inputs()
    profiled(measured, *inputs)
    plain(*inputs)
    for one, other in zip(plain.state_dict().values(), measured.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_kernels_of_all_branches_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler is a GPU's: here it finds a kernel for each branch, and every branch did run for it."""
    ran = []

    def measure(runs: Any) -> list[Demand]:
        ran.extend(run() for run in runs)
        return [Demand(10.0 * number, 5.0) for number in range(1, len(ran) + 1)]

    init = Profiler.__init__

    def in_detail(self: Profiler, *args: Any) -> None:
        init(self, *args)
        self._in_detail = True

    monkeypatch.setattr(Profiler, "__init__", in_detail)
    monkeypatch.setattr(Profiler, "_peak_bytes", lambda *_: 4096)
    monkeypatch.setattr(profile.demand, "measure", measure)
    case = SMALL["towers"]
    ((regions, times),) = profiled(case.model(), *case.inputs())
    found = [alone for branches in times.values() for alone in branches]
    assert len(ran) == len(found) == sum(len(region.branches) for region in regions.regions)
    assert [alone.demand.kernel_us for alone in found] == [10.0 * number for number in range(1, len(found) + 1)]
    assert {alone.peak_bytes for alone in found} == {4096}
    assert [us for region in kernels_us(times).values() for us in region] == [alone.demand.kernel_us for alone in found]

    monkeypatch.setattr(profile.demand, "measure", lambda _runs: None)
    ((_, times),) = profiled(case.model(), *case.inputs())
    assert all(alone.demand is None for branches in times.values() for alone in branches)
    assert kernels_us(times) == {}
    assert sorted(measured_us(times)) == sorted(times)
