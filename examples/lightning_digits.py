"""Trains transformer towers on scikit-learn's handwritten digits with Lightning's Trainer.

    python examples/lightning_digits.py
    mpsrun examples/lightning_digits.py

It knows nothing of mpsrun. Needs the package `lightning` (extra `frameworks`).
"""

from __future__ import annotations

import argparse

import lightning
import torch
from networks import Towers
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

TEST = 297  # pictures kept for the test


class Digits(lightning.LightningModule):
    """Reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Towers(towers=3, width=32, layers=2, features=8, classes=10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.net(pictures).mean(1)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        pictures, labels = batch
        loss = functional.cross_entropy(self(pictures), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        pictures, labels = batch
        self.log("test loss", functional.cross_entropy(self(pictures), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, test after each epoch, and print the last losses."""
    parser = argparse.ArgumentParser(description="Trains transformer towers on handwritten digits with Lightning.")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    lightning.seed_everything(0)
    digits = load_digits()
    pictures, labels = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    train = TensorDataset(pictures[TEST:], labels[TEST:])
    test = TensorDataset(pictures[:TEST], labels[:TEST])

    trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(test, 99))
    for name in ("loss", "test loss"):
        print(f"{name}: {trainer.callback_metrics[name].item():.6f}")


if __name__ == "__main__":
    main()
