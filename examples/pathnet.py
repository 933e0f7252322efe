"""Searches paths through a PathNet on scikit-learn's handwritten digits (Fernando et al., arXiv 1701.08734).

    python examples/pathnet.py
    mpsrun examples/pathnet.py

Each layer has more modules than a path uses. Two paths at a time are trained and compared; the worse one becomes a
changed copy of the better one. `active` names the modules of a layer that run in a call.
"""

from __future__ import annotations

import argparse
import random

import torch
from networks import conv
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import mpsrun

LAYERS, MODULES, ACTIVE = 2, 6, 3
BATCH = 64
STEPS = 4  # of training for a path, before it is compared
CHANGE = 0.2  # chance that a module of a copied path becomes another one

Path = list[list[int]]  # by layer, the modules that are used


class PathNet(nn.Module):
    """Layers of modules whose outputs add up, of which a path uses some."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = conv(1, channels, 3)

        def module() -> nn.Module:
            return nn.Sequential(conv(channels, channels, 3), conv(channels, channels, 3))

        self.layers = nn.ModuleList(mpsrun.Branches([module() for _ in range(MODULES)]) for _ in range(LAYERS))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor, path: Path) -> torch.Tensor:
        x = self.stem(x)
        for layer, active in zip(self.layers, path, strict=True):
            x = layer(x, active=active)
        return self.head(x.mean((2, 3)))


def changed(path: Path) -> Path:
    """A copy with some of its modules replaced by others."""
    copy = [list(active) for active in path]
    for active in copy:
        for i in range(ACTIVE):
            if random.random() < CHANGE:
                active[i] = random.choice([m for m in range(MODULES) if m not in active])
    return copy


def main() -> None:
    """Hold the rounds of the search, and print the last losses."""
    parser = argparse.ArgumentParser(description="Searches paths through a PathNet on handwritten digits.")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()

    torch.manual_seed(0)
    random.seed(0)
    digits = load_digits()
    pictures, labels = (
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1,
        torch.tensor(digits.target),
    )
    model = PathNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def fitness(path: Path) -> float:
        """Train a path for some steps; its last loss."""
        for _ in range(STEPS):
            batch = torch.randint(len(labels), (BATCH,))
            loss = functional.cross_entropy(model(pictures[batch], path), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    paths = [[random.sample(range(MODULES), ACTIVE) for _ in range(LAYERS)] for _ in range(8)]
    for _ in range(args.rounds):
        rivals = random.sample(range(len(paths)), 2)
        losses = [fitness(paths[rival]) for rival in rivals]
        better, worse = rivals if losses[0] <= losses[1] else rivals[::-1]
        paths[worse] = changed(paths[better])
    print(f"losses: {losses[0]:.6f} {losses[1]:.6f}")
    print(f"path: {paths[better]}")


if __name__ == "__main__":
    main()
