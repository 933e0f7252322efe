"""What `scripts/chaos` disturbs: a training with a checkpoint per step, that writes down what it did.

    chaos_training.py DIRECTORY STEPS

Appends to DIRECTORY/journal: `start STEP` for each life, `STEP LOSS` for each step, `end`. A file `wanted` there names
a fault for the script itself, which takes it up in its next step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import mpsrun

PAUSE_S = 0.05  # a step of this network takes no time: this leaves the faults some to hit
# On a GPU a fault should often hit a running kernel.
ROWS_ON_GPU, PAUSE_ON_GPU_S = 65536, 0.0


class Towers(nn.Module):
    """Three branches with statistics, and a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(tower(x) for tower in self.towers))


def fail(fault: str, device: str) -> None:
    """Do what was asked for."""
    match fault:
        case "raise":
            raise RuntimeError("asked for by scripts/chaos")
        case "exit":
            os._exit(9)
        case "illegal access":  # a kernel that writes where no memory is
            bad = torch._C._construct_storage_from_data_pointer(1 << 20, torch.device(device), 1 << 20)
            torch.empty(0, dtype=torch.uint8, device=device).set_(bad).fill_(1)
            torch.cuda.synchronize()


def main() -> None:
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, pause_s = (ROWS_ON_GPU, PAUSE_ON_GPU_S) if device == "cuda" else (1, PAUSE_S)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    data = torch.utils.data.TensorDataset(torch.randn(320, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model = Towers().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    checkpointer = mpsrun.Checkpointer(directory / "checkpoints", model, optimizer)
    with (directory / "journal").open("a", buffering=1) as journal:
        journal.write(f"start {checkpointer.step}\n")
        for _ in checkpointer.epochs(steps * 16 // len(data)):
            for (batch,) in checkpointer.batches(loader):
                wanted = directory / "wanted"
                if wanted.exists():
                    fault = wanted.read_text()
                    wanted.unlink()
                    fail(fault, device)
                optimizer.zero_grad()
                loss = model(batch.to(device).repeat(rows, 1)).square().mean()
                loss.backward()
                optimizer.step()
                journal.write(f"{checkpointer.step} {loss.item()!r}\n")
                time.sleep(pause_s)
        journal.write("end\n")


main()
