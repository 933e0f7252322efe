"""Trains a small GoogLeNet on scikit-learn's handwritten digits: an ordinary PyTorch script.

    python examples/digits.py
    mpsrun examples/digits.py

It knows nothing of mpsrun.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from networks import GoogLeNet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

SIZE = 16  # pixels a side; of the 8 that the data has nothing would be left after three poolings
WIDTH = 0.125  # of the channels in the paper
PEAK_LR = 3e-3
START = 0.001  # of PEAK_LR

Pictures = tuple[torch.Tensor, torch.Tensor]


def load() -> tuple[Pictures, Pictures]:
    """Pictures (float, from -1 to 1, 1 x SIZE x SIZE) and labels, for training and for the test."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    pictures = functional.interpolate(pictures, size=(SIZE, SIZE), mode="bilinear")
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of pictures that the model gets right."""
    model.eval()
    with torch.no_grad():
        right = model(pictures).argmax(1) == labels
    return right.float().mean().item()


def rate_of(epoch: int, total: int) -> Callable[[int], float]:
    """The learning rate by step, as a part of the highest: almost none in the first epoch, then up and down again.

    A deep network with BatchNorm makes much of little in its first steps: at full rate the rounding errors of two
    runs that should be alike grow tenfold with each step.
    """
    return lambda step: max(START, math.sin(math.pi * (step - epoch) / max(1, total - epoch)))


def main() -> None:
    """Train, then test."""
    parser = argparse.ArgumentParser(description="Trains a small GoogLeNet on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, help="stop after so many steps, without the test")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the loss of each step, one a line")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = load()
    # The last batch of an epoch would be smaller than the others; without it all steps look alike.
    batches = DataLoader(TensorDataset(*train), args.batch_size, shuffle=True, drop_last=True)
    steps = args.steps or args.epochs * len(batches)

    model = GoogLeNet(classes=10, width=WIDTH, colours=1, stem_stride=1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(len(batches), args.epochs * len(batches)))

    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps)
        while len(losses) < steps:
            for pictures, labels in batches:
                loss = functional.cross_entropy(model(pictures.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
                if len(losses) == steps:
                    break

    if args.losses is not None:
        args.losses.write_text("".join(f"{loss!r}\n" for loss in losses))
    if args.steps is None:
        print(f"test accuracy: {accuracy(model, *(tensor.to(device) for tensor in test)):.2%}")


if __name__ == "__main__":
    main()
