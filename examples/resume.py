"""Trains on scikit-learn's handwritten digits, and goes on where it was when it is started again.

    mpsrun --max-restarts 3 examples/resume.py --checkpoints $(mktemp -d)
    mpsrun --max-restarts 3 examples/resume.py --checkpoints $(mktemp -d) --fail-at 30

The second one ends itself in the middle of its 30th step. Two lines of the loop are those of mpsrun.Checkpointer.
Numbers are float64: in float32 such a network makes other losses of a step's rounding, some dozen steps later.
"""

from __future__ import annotations

import argparse
import os
import signal

import torch
from networks import GoogLeNet
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import mpsrun


def main() -> None:
    """Train for some epochs, and say what the last loss was."""
    parser = argparse.ArgumentParser(description="Trains with a checkpoint every 5 steps.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoints", default="checkpoints", help="the directory to keep them in")
    parser.add_argument("--fail-at", type=int, default=-1, help="end by SIGKILL in this step, the first time")
    args = parser.parse_args()
    first_time = os.environ.get("MPSRUN_RESTART_COUNT", "0") == "0"

    torch.manual_seed(0)
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float64).unsqueeze(1) / 8 - 1
    pictures = functional.interpolate(pictures, size=(16, 16), mode="bilinear")
    loader = DataLoader(TensorDataset(pictures, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    model = GoogLeNet(classes=10, width=0.125, colours=1, stem_stride=1).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpointer = mpsrun.Checkpointer(args.checkpoints, model, optimizer, every=5)
    for epoch in checkpointer.epochs(args.epochs):
        loss = torch.zeros(())
        for x, y in checkpointer.batches(loader):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            if checkpointer.step == args.fail_at and first_time:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
        print(f"epoch {epoch}: step {checkpointer.step}, loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
