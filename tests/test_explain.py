"""What `mpsrun explain` tells of a network, from Python and from the command line."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from launch.conftest import Runner, runner  # noqa: F401 - a fixture
from networks import SMALL, GoogLeNet, InPlace, ResidualChain, images, rows
from torch import nn

import mpsrun
from mpsrun.config import Config
from mpsrun.plan import cost
from mpsrun.run import explain
from mpsrun.run.explain_tree import NOTHING
from mpsrun.run.explanation import Explanation

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever workers other tests share."""
    monkeypatch.setattr(mpsrun.config, "current", lambda: Config(workers=3))


class Shared(nn.Module):
    """Branches that write what the other one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.register_buffer("total", torch.zeros(6))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        parts = []
        for line in self.lines:
            y = line(x).tanh()
            self.total.add_(y.detach().mean(0))
            parts.append(y * self.total)
        return torch.cat(parts, 1)


def state_of(model: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {
        f"{name} of {key}": value for key, module in model.named_modules() for name, value in vars(module).items()
    }
    return state | {"random": torch.get_rng_state(), "grads": [p.grad for p in model.parameters()]}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, wanted[name]), name
        else:
            assert value is wanted[name] or value == wanted[name], name


def unwrapped(found: Explanation) -> str:
    return " ".join(str(found).replace("│", " ").split())


def test_googlenet_has_nine_regions_of_four_branches() -> None:
    found = mpsrun.explain(GoogLeNet(), images())
    assert [len(region.branches) for region in found.regions] == [4] * 9
    assert [branch.name for branch in found.regions[0].branches] == ["one", "three", "five", "pool"]
    assert {region.kind for region in found.regions} == {"Inception"}
    for region in found.regions:
        assert region.measured
        assert region.bound.speed_up >= 1
        assert region.bound.serial_us == pytest.approx(sum(branch.time_us for branch in region.branches))
        assert region.bound.critical_us == max(branch.time_us for branch in region.branches)
        assert [branch.critical for branch in region.branches].count(True) == 1
        assert all(branch.forward_us > 0 < branch.backward_us for branch in region.branches)  # type: ignore[operator]
        assert all(branch.kernels > 0 and branch.flops > 0 and branch.bytes_in > 0 for branch in region.branches)
        assert region.plan.declined == "one op already uses every core of this machine"
    (plan,) = found.plan
    assert (plan.name, plan.source, plan.measured_step_us) == ("serial", "estimated", None)
    assert plan.predicted_us == pytest.approx(found.bound.serial_us)
    assert found.networks[0].name == "GoogLeNet, training of 4x3x6x6"


@pytest.mark.parametrize("name", SMALL)
def test_every_network_is_explained_and_left_as_it_was(name: str) -> None:
    model, inputs = SMALL[name].model(), SMALL[name].inputs()
    before = state_of(model)
    found = mpsrun.explain(model, inputs)
    assert_same(state_of(model), before)
    outer = sorted(len(region.branches) for region in found.regions)
    assert set(SMALL[name].regions) <= set(outer)
    assert found.bound.speed_up >= 1
    assert len(str(found).splitlines()) > len(found.regions)


def test_the_json_reads_back() -> None:
    found = mpsrun.explain(SMALL["nested forks"].model(), rows())
    assert msgspec.json.decode(found.to_json(), type=Explanation) == found
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert {"regions", "bound", "plan", "refused", "networks"} == data.keys()
    assert {"branches", "bound", "plan"} <= data["regions"][0].keys()
    assert [region["parent"] for region in data["regions"]] == [None, [0, 0], [0, 1]]


def test_what_is_refused_has_the_users_line() -> None:
    model = Shared()
    found = mpsrun.explain(model, rows())
    (refused,) = found.refused
    assert refused.where is not None
    assert refused.where.startswith("test_explain.py:")
    assert "write" in refused.reason
    assert f"{refused.where}: {refused.reason}" in unwrapped(found)
    assert model.calls == 0
    assert not model.total.any()


def test_a_chain_has_nothing_to_explain() -> None:
    found = mpsrun.explain(ResidualChain(), rows())
    assert (found.regions, found.plan, found.bound.speed_up) == ((), (), 1.0)
    assert "no branches that could run at the same time" in str(found)
    assert "nothing to explain" in str(Explanation())


def test_modes_count_as_they_are() -> None:
    model = GoogLeNet().eval()
    with torch.no_grad():
        found = mpsrun.explain(model, images())
    assert found.networks[0].name == "GoogLeNet, evaluation of 4x3x6x6"
    assert all(branch.backward_us == 0 for region in found.regions for branch in region.branches)


def test_inputs_as_one_tensor_as_a_tuple_and_by_name() -> None:
    model = SMALL["inception"].model()
    (x,) = images()
    found = [mpsrun.explain(model, inputs) for inputs in (x, (x,), [x], {"x": x})]
    assert [len(one.regions) for one in found] == [1] * 4


def test_a_compiled_network_and_a_function() -> None:
    model = GoogLeNet()
    (x,) = images()
    wanted = [branch.name for region in mpsrun.explain(model, x).regions for branch in region.branches]
    for other in (torch.compile(model, backend="eager"), model.forward):
        found = mpsrun.explain(other, x)
        assert [branch.name for region in found.regions for branch in region.branches] == wanted
    model.compile(backend="eager")
    assert len(mpsrun.explain(model, x).regions) == 9


def test_a_network_with_a_graph_break() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    first = SMALL["inception"].model()
    second = nn.Sequential(nn.Conv2d(8, 3, 1), SMALL["inception"].model())
    found = mpsrun.explain(model, images())
    assert [region.network for region in found.regions] == [0, 1]
    assert found.bound.serial_us == pytest.approx(sum(network.bound.serial_us for network in found.networks))


def test_errors_of_the_network_are_its_own() -> None:
    model, (x,) = GoogLeNet(), images(channels=5)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="channels"):
        mpsrun.explain(model, x)
    assert_same(state_of(model), before)


def test_a_branch_that_could_not_run_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpsrun.run.profile.LIMIT_S", 0.0)
    found = mpsrun.explain(GoogLeNet(), images())
    assert not any(region.measured for region in found.regions)
    assert all(branch.time_us > 0 for region in found.regions for branch in region.branches)
    assert "would take" in str(found)
    assert "times estimated" in str(found)


def test_a_pinned_branch_says_why() -> None:
    found = mpsrun.explain(SMALL["dropout"].model(), rows())
    pinned = [branch for region in found.regions for branch in region.branches if branch.pinned]
    assert pinned
    assert {branch.lane for branch in pinned} == {"lead"}
    assert f"must stay in the lead: {pinned[0].pinned}" in unwrapped(found)


def test_where_lanes_may_pay_the_plan_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = dataclasses.replace(cost.MACHINES["cpu"], cores_shared=False, crossing_us=0.01)
    monkeypatch.setitem(cost.MACHINES, "cpu", machine)
    found = mpsrun.explain(SMALL["towers"].model(), SMALL["towers"].inputs())
    assert len(found.plan[0].candidates) > 1
    assert found.plan[0].predicted_us == min(candidate.predicted_us for candidate in found.plan[0].candidates)
    names = {name for region in found.regions for name in region.plan.lanes}
    assert (names != {"lead"}) == (found.plan[0].name != "serial")


SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
from networks import GoogLeNet
model = GoogLeNet()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
print("the script's own line")
for step in range(int(sys.argv[1])):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
print("the script's last line")
"""


@pytest.mark.slow
def test_the_command_line(runner: Runner) -> None:  # noqa: F811
    script = runner.script(SCRIPT)
    done = runner.mpsrun("explain", script, "4")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "9 regions, 36 branches" in text
    assert "region 8, Inception blocks.8" in text
    assert b"script's" not in done.stdout
    assert b"the script's own line\n" in done.stderr
    assert b"the script's last line\n" in done.stderr


def test_the_command_line_with_json_lanes_and_steps(runner: Runner) -> None:  # noqa: F811
    script = runner.script(SCRIPT)
    done = runner.mpsrun("explain", "--json", "--steps", "3", "--lanes", "workers", "--workers", "2", script, "1000")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Explanation)
    assert [len(region.branches) for region in found.regions] == [4] * 9
    assert found.plan[0].source == "forced"
    assert {name for region in found.regions for name in region.plan.lanes} == {"lead", "worker 1", "worker 2"}
    assert b"stopped the script after 3 steps" in done.stderr
    assert b"last line" not in done.stderr


def test_scripts_without_a_network_and_without_branches(runner: Runner) -> None:  # noqa: F811
    done = runner.mpsrun("explain", runner.script("print('hello')"))
    assert (done.returncode, done.stdout) == (0, f"{NOTHING}\n".encode())
    chain = SCRIPT.replace("import GoogLeNet", "import ResidualChain as GoogLeNet").replace("4, 3, 6, 6", "5, 6")
    done = runner.mpsrun("explain", runner.script(chain), "3")
    assert done.returncode == 0, done.stderr
    assert b"no branches that could run at the same time" in done.stdout


@pytest.mark.slow
def test_a_script_that_fails_is_explained_with_its_own_status(runner: Runner) -> None:  # noqa: F811
    done = runner.mpsrun("explain", "--json", runner.script(SCRIPT + "raise SystemExit(3)\n"), "2")
    assert done.returncode == 3
    assert len(json.loads(done.stdout)["regions"]) == 9


def test_a_script_that_is_called_explain(runner: Runner) -> None:  # noqa: F811
    runner.script("print('mine')", "explain")
    for words in (["./explain"], ["--", "explain"]):
        assert runner.mpsrun("--workers", "1", *words).stdout == b"mine\n"


def test_a_reader_that_goes_away(runner: Runner) -> None:  # noqa: F811
    runner.script("print('hello')")
    command = f"{sys.executable} -m mpsrun explain train.py | true"
    done = subprocess.run(command, shell=True, cwd=runner.cwd, env=runner.environ(), capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr


def test_the_launched_graph_keeps_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script the lanes get the graph as ever, after it has been looked at."""
    plain = InPlace().double()
    model = copy.deepcopy(plain)
    settings = dataclasses.replace(mpsrun.config.current(), explain="text")
    monkeypatch.setattr(mpsrun.config, "current", lambda: settings)
    monkeypatch.setattr(explain, "_watched", [])
    model.compile(backend="mpsrun")
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
    found = explain.of_script()
    assert len(found.networks) == 1
    assert found.plan[0].source == "estimated"
