"""Habits of whole scripts: the same output under `python` and on worker lanes, and the same one again."""

import pytest

from tests.launch.conftest import Runner

NETWORK = """
import copy, io, pickle, torch
from torch import nn

class Network(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4)) for _ in range(3)
        )
        self.head = nn.Linear(12, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = torch.tanh(self.trunk(x))
        return self.head(self.dropout(torch.cat([path(x) for path in self.paths], 1)))

def train(model, steps, forward=None):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        loss = (model if forward is None else forward)(torch.randn(5, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()

def told(*losses):
    print(*(f"{loss:.5f}" for loss in losses))

torch.manual_seed(0)
torch.set_num_threads(1)
model = Network()
"""
LANES = ("--lanes", "workers", "--workers", "2", "--verbose")
REPEATED = (
    NETWORK
    + """
torch.use_deterministic_algorithms(True)
for loss in train(model, 6):
    print(loss.item().hex())
for name, value in model.state_dict().items():
    print(name, value.double().sum().item().hex(), value.double().square().sum().item().hex())
"""
)
AFTER_TRAINING = (
    NETWORK
    + """
told(*train(model, 4))
model.eval()
x = torch.randn(4, 6)
exported = torch.export.export(model, (x,)).module()
strictly = torch.export.export(model, (x,), strict=True).module()
traced = torch.jit.trace(model, (x,))
file = io.BytesIO()
torch.save(model.state_dict(), file)
fresh = Network()
fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
for other in (exported, strictly, traced, fresh.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    told(*other(x).flatten())
print(len(file.getvalue()), sorted(model.state_dict()) == sorted(fresh.state_dict()))
told(*train(model.train(), 2))
late = Network(5)
told(*train(late, 3))
"""
)
OWN_COMPILER = (
    NETWORK
    + """
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

told(*train(model, 1, torch.compile(model, backend=backend, fullgraph=True)))
late = Network(4)
told(*train(late, 1))
told(*train(late, 3, torch.compile(late, backend=backend, fullgraph=True)))
other = Network(5)
other.compile(backend=backend)
told(*train(other, 2))
print(len(graphs))
"""
)
ODD_INPUT = (
    NETWORK
    + """
class Marked(torch.Tensor):
    pass

class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 4) for _ in range(3))

    def forward(self, x):
        return torch.cat([torch.tanh(torch.mm(x, weight)) for weight in self.weights], 1)

model = Sums()
odd = [torch.eye(6).to_sparse(), torch.eye(6).as_subclass(Marked)]
told(*train(model, 3))
for given in odd * 2:
    loss = model(given).square().sum()
    loss.backward()
    told(loss.detach().as_subclass(torch.Tensor))
told(*train(model, 2))
"""
)


def ran_on_lanes(words: bytes) -> bool:
    """Whether the table at the end names a worker."""
    return b"worker 1" in words


def test_two_runs_are_equal_to_the_bit(runner: Runner) -> None:
    script = runner.script(REPEATED)
    first, second = (runner.mpsrun(*LANES, script) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert ran_on_lanes(first.stderr)
    assert ran_on_lanes(second.stderr)
    assert first.stdout == second.stdout
    assert first.stdout.count(b"0x") > 20


def same(runner: Runner, text: str) -> bytes:
    """A script prints the same plainly and on lanes; what mpsrun said."""
    script = runner.script(text)
    plain, ours = runner.python(script), runner.mpsrun(*LANES, script)
    assert plain.returncode == 0, plain.stderr
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout
    return ours.stderr


@pytest.mark.slow
def test_after_training(runner: Runner) -> None:
    """Exported, traced, saved, copied, pickled, trained on, and a network that was made later."""
    assert ran_on_lanes(same(runner, AFTER_TRAINING))


def test_compiler_of_the_script(runner: Runner) -> None:
    """From the start, or on a network that has been compiled in place already."""
    assert same(runner, OWN_COMPILER).count(b"in place") == 1


@pytest.mark.slow
def test_odd_input(runner: Runner) -> None:
    said = same(runner, ODD_INPUT)
    assert ran_on_lanes(said)
    assert said.count(b"sparse") == 1
    assert said.count(b"Marked") == 1
    assert b"Traceback" not in said
