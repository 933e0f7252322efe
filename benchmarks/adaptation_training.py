"""A training for `scripts/adapt`, which ends by itself. Nothing of it knows of mpsrun.

    adaptation_training.py SECONDS [wide|cached] [in-place]

wide: branches that fill the GPU one by one, instead of towers that do not. cached: the same with tensors of which one
branch's fit into the cache of the GPU, and two branches' do not. in-place: the network cuts its input in place, which
keeps it from being captured, and leaves the other lanes to it.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from examples.networks import Wide

# Batches of the networks whose tensors have 64 and 16 MiB: the L2 cache of an H100 or H200 has 50 MiB.
WIDE = {"wide": 16, "cached": 4}


class Towers(nn.Module):
    """Four encoders of a transformer, side by side, and what is left of each."""

    def __init__(self) -> None:
        super().__init__()
        layer = {"d_model": 256, "nhead": 4, "dim_feedforward": 1024, "dropout": 0.0, "batch_first": True}
        self.towers = nn.ModuleList(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 6, enable_nested_tensor=False) for _ in range(4)
        )
        self.head = nn.Linear(4 * 256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([tower(x).mean(1) for tower in self.towers], 1))


class Cut(nn.Module):
    """A network behind an op that writes to its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.clamp_(-3.0, 3.0))


class Training:
    """The network, its optimizer and one batch."""

    def __init__(self, *kind: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batches = [batch for word, batch in WIDE.items() if word in kind]
        network = Wide(adds=16) if batches else Towers()
        self.model = (Cut(network) if "in-place" in kind else network).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.x = torch.randn(*((batches[0], 2**20) if batches else (4, 128, 256)), device=device)
        self.loss = torch.zeros(())

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.loss = self.model(self.x).square().mean()
        self.loss.backward()
        self.optimizer.step()


def main() -> None:
    training = Training(*sys.argv[2:])
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
