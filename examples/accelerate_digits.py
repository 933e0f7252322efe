"""Trains transformer towers on scikit-learn's handwritten digits with Hugging Face's accelerate.

    python examples/accelerate_digits.py
    mpsrun examples/accelerate_digits.py

It knows nothing of mpsrun. Needs the package `accelerate` (extra `frameworks`).
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from networks import Towers
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

TEST = 297  # pictures kept for the test


class Digits(nn.Module):
    """Reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Towers(towers=3, width=32, layers=2, features=8, classes=10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.net(pictures).mean(1)


def main() -> None:
    """Train, then test, and print the last losses."""
    parser = argparse.ArgumentParser(description="Trains transformer towers on handwritten digits with accelerate.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()

    set_seed(0)
    digits = load_digits()
    pictures, labels = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    train = TensorDataset(pictures[TEST:], labels[TEST:])
    test = TensorDataset(pictures[:TEST], labels[:TEST])

    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
    model = Digits()
    model, optimizer, batches, held_back = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        DataLoader(train, 32, shuffle=True),
        DataLoader(test, 99),
    )
    loss = torch.zeros(())
    for _ in range(args.epochs):
        model.train()
        for pictures, labels in batches:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(pictures), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.print(f"loss: {loss.item():.6f}")

    model.eval()
    with torch.no_grad():
        losses = [functional.cross_entropy(model(pictures), labels) for pictures, labels in held_back]
    accelerator.print(f"test loss: {torch.stack(losses).mean().item():.6f}")


if __name__ == "__main__":
    main()
