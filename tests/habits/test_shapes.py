"""Shapes and paths that change from step to step, and calls from threads."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from alike import LAST, Seen, parameter, same, state, sum_of, train, x
from networks import Three, mlp, why_not_here
from torch import Tensor, nn

from mpsrun.run import backend, in_place

pytestmark = pytest.mark.usefixtures("workers")


def test_batch_sizes(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        seen = {}
        for i, rows in enumerate([5, 3, 7, 4, 5, 3, 7, 4, 2]):
            sum_of(model(x(i, rows))).backward()
            seen[f"step {i}"] = parameter(model, LAST).grad.clone()  # type: ignore[union-attr]
        return {**seen, **state(model)}

    same(script, calls=8)


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


class Sequences(nn.Module):
    """Sequences of any length: a recurrent branch, an attending one, and a convolution, over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attending = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.abs().mul(3).long().clamp(max=8)  # an embedding is looked up by whole numbers
        x = self.table(rows)
        found = [self.recurrent(x)[0], self.attending(x), self.convolution(x.transpose(1, 2)).transpose(1, 2)]
        return self.head(torch.cat([torch.tanh(y).mean(1) for y in found], 1))


def test_lengths_of_sequences(nothing_kept: None) -> None:
    if reason := why_not_here("recurrent"):
        pytest.skip(reason)

    def script(model: nn.Module) -> Seen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for i, (rows, length) in enumerate([(5, 6), (5, 4), (5, 7), (3, 5), (5, 4), (5, 1), (5, 4), (3, 5)]):
            optimizer.zero_grad()
            losses.append(sum_of(model(x(i, rows).repeat(1, 2)[:, :length])))
            losses[-1].backward()
            optimizer.step()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Sequences, calls=4)


def test_sizes_that_are_always_new(nothing_kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared any more for sizes which never come again; those that are known still run on lanes."""
    monkeypatch.setattr(backend, "MOST_MISSES", 2)

    def script(model: nn.Module) -> Seen:
        losses = [sum_of(model(x(i, rows))).detach() for i, rows in enumerate([3, 4, 5, 6, 7, 4, 9, 5])]
        return {"losses": torch.stack(losses), **state(model)}

    (_, graph) = same(script)
    assert len(graph.regions) == 4  # 3 and 4, then 9 and 5 after a known one
    assert graph.calls == 1


def test_last_smaller_batch(nothing_kept: None) -> None:
    """Epochs over a loader whose last batch is smaller, evaluation with another batch size."""

    def script(model: nn.Module) -> Seen:
        data = torch.utils.data.TensorDataset(x(0, rows=13), x(1, rows=13)[:, :2])
        loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        seen: Seen = {}
        for epoch in range(3):
            for i, (given, wanted) in enumerate(loader):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(given), wanted)
                loss.backward()
                optimizer.step()
                seen[f"loss {epoch} {i}"] = loss.detach()
            with torch.no_grad():
                seen[f"evaluated {epoch}"] = model.eval()(data.tensors[0]).clone()
            model.train()
        return {**seen, **state(model)}

    same(script, calls=12)


def test_empty_batch(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        model.eval()
        seen: Seen = {}
        for i, rows in enumerate([5, 0, 4, 0, 5]):
            output = model(x(i, rows))
            sum_of(output).backward()
            seen[f"output {i}"] = output.detach()
        return {**seen, **state(model)}

    same(script)


class Talkative(Three):
    """Prints, and reads numbers out of tensors, between branches and inside of them."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        print("mean", round(float(x.detach().mean()), 6))
        found = [path(x) for path in self.paths]
        total = torch.cat(found, 1)
        if total.detach().abs().max().item() > 0.5:
            total = total / 2
        return torch.tanh(self.head(total) + torch.cat([path(x) for path in self.paths], 1).sum(1, keepdim=True))


def test_numbers_read_in_forward(nothing_kept: None, capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def script(model: nn.Module) -> Seen:
        capsys.readouterr()
        losses = train(model, 5)
        printed.append(capsys.readouterr().out)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, make=Talkative, calls=4)
    assert printed[0] == printed[1]
    assert printed[0].count("mean") == 5


class Collecting(Three):
    """Keeps what it saw in a list, whose length Dynamo compiles for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean().item())
        return super().forward(x)


def test_network_that_is_compiled_in_every_call(nothing_kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "MOST_FRESH", 4)
    models = []

    def script(model: nn.Module) -> Seen:
        models.append(model)
        return {"losses": torch.stack(train(model, 6)), "seen": model.seen, **state(model)}

    same(script, make=Collecting, calls=0)
    assert models[1]._compiled_call_impl is None  # left alone


class Changing(Three):
    """Takes other paths from step to step: by a counter, by an attribute, by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.skipped = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = torch.tanh(self.trunk(x))
        found = [path(x) if i != self.skipped else x[:, :4] for i, path in enumerate(self.paths)]
        if self.steps % 3 == 0:
            found[1] = found[1] / self.steps
        return self.head(torch.cat(found, 1))


def test_paths_that_change(nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        losses = []
        for i, skipped in enumerate(random.Random(1).choices((0, 2), k=12)):
            model.skipped = skipped  # type: ignore[assignment]
            losses += train(model, 1, start=i)
        return {"losses": torch.stack(losses), "steps": model.steps, **state(model)}

    same(script, make=Changing, calls=4)


def test_layers_added_on_the_way(nothing_kept: None) -> None:
    """A network that grows: another branch, and a wider head."""

    class Growing(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([path(x) for path in self.paths], 1))

    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        torch.manual_seed(7)
        model.get_submodule("paths").append(mlp(6, 8, 4).to(x().device, torch.float64))  # type: ignore[operator]
        model.head = nn.Linear(16, 2).to(x().device, torch.float64)
        losses += train(model, 3, start=2)
        model.get_submodule("paths")[1] = nn.Linear(6, 4).to(x().device, torch.float64)  # type: ignore[index]
        losses += train(model, 3, start=5)
        return {"losses": torch.stack(losses), **state(model)}

    same(script, make=Growing, calls=10)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns in each of some threads that run at the same time."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count), timeout=120))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_called_from_several_threads(mode: Any, nothing_kept: None) -> None:
    """One network, several threads, each with its own inputs, forward and backward."""

    def script(model: nn.Module) -> Seen:
        model.eval()
        parameters = [p for _, p in sorted(model.named_parameters())]

        def work(number: int) -> list[Tensor]:
            found = []
            for i in range(6):
                with mode():
                    output = model(x(100 * number + i))
                found.append(output.detach())
                if output.requires_grad:
                    found += torch.autograd.grad(sum_of(output), parameters)
            return found

        found = [work(9), *in_threads(3, work)]
        return {f"{n} {i}": value for n, values in enumerate(found) for i, value in enumerate(values)}

    same(script, calls=40)


def test_networks_of_several_threads(nothing_kept: None) -> None:
    """Each thread trains a network of its own."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(Three() for _ in range(3))

    def script(model: nn.Module) -> Seen:
        losses = in_threads(3, lambda i: train(model.get_submodule(f"members.{i}"), 5, start=10 * i))
        return {"losses": torch.stack([torch.stack(some) for some in losses]), **state(model)}

    same(script, make=Ensemble, calls=24, parts=("members.0", "members.1", "members.2"))
