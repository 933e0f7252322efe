"""A training for `scripts/adapt`, which ends by itself. Nothing of it knows of mpsrun.

    adaptation_training.py SECONDS [in-place]

in-place: the network cuts its input in place, which keeps it from being captured, and leaves the other lanes to it.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn


class Towers(nn.Module):
    """Four encoders of a transformer, side by side, and what is left of each."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        layer = {"d_model": 256, "nhead": 4, "dim_feedforward": 1024, "dropout": 0.0, "batch_first": True}
        self.towers = nn.ModuleList(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 6, enable_nested_tensor=False) for _ in range(4)
        )
        self.head = nn.Linear(4 * 256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            x.clamp_(-3.0, 3.0)
        return self.head(torch.cat([tower(x).mean(1) for tower in self.towers], 1))


class Training:
    """The network, its optimizer and one batch."""

    def __init__(self, in_place: bool = False) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Towers(in_place).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.x, self.y = torch.randn(4, 128, 256, device=device), torch.randint(10, (4,), device=device)
        self.loss = torch.zeros(())

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.loss.backward()
        self.optimizer.step()


def main() -> None:
    training = Training(in_place=sys.argv[2:] == ["in-place"])
    end_s = time.monotonic() + float(sys.argv[1])
    steps = 0
    while time.monotonic() < end_s:
        training.step()
        steps += 1
        if steps % 50 == 0 and not torch.isfinite(training.loss):
            sys.exit("the loss is not finite")
    print(steps)


if __name__ == "__main__":
    main()
