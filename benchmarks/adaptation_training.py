"""A training for `scripts/adapt`: `SECONDS`, after which it ends by itself. Nothing of it knows of mpsrun."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn


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


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Towers().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, y = torch.randn(4, 128, 256, device=device), torch.randint(10, (4,), device=device)
    end_s = time.monotonic() + float(sys.argv[1])
    steps = 0
    while time.monotonic() < end_s:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        steps += 1
        if steps % 50 == 0 and not torch.isfinite(loss):
            sys.exit("the loss is not finite")
    print(steps)


if __name__ == "__main__":
    main()
