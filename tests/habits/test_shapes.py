"""Shapes and paths that change from step to step, and calls from threads."""

import threading

import pytest
import torch
from alike import LAST, Seen, parameter, same, state, sum_of, train, x
from networks import Three
from torch import Tensor, nn

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
