"""A training script with a checkpoint per step that breaks down where it is told to; run by test_training.py.

    training.py DIRECTORY [WHERE HOW STEP]

WHERE: import, forward, backward, between, exit. HOW: raise, exit, a signal's name, or hang. It breaks down in its first
life only, writes each step's number and loss to DIRECTORY/losses, and the final weights' sum at the end.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

directory, where, how, at, *_ = (Path(sys.argv[1]), *sys.argv[2:], "", "", "-1")
first = int(os.environ.get("MPSRUN_RESTART_COUNT", "0")) == 0


def break_down(place: str, step: int = -1) -> None:
    """Do what was asked for, if this is the place."""
    if not first or place != where or step != int(at):
        return
    if how == "raise":
        raise RuntimeError(f"broken in {place}")
    if how == "exit":
        os._exit(7)
    if how == "hang":
        print("hangs", flush=True)
        sum(range(10**11))  # no signal is looked at, no other thread gets the GIL, for many minutes
    os.kill(os.getpid(), signal.Signals[how])


break_down("import")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import mpsrun  # noqa: E402


class Gate(torch.autograd.Function):
    """Breaks down in forward or backward; else it does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: int) -> Tensor:
        ctx.step = step
        break_down("forward", step)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        break_down("backward", ctx.step)
        return grads[0], None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(path(x) for path in self.paths))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    checkpointer = mpsrun.Checkpointer(directory / "checkpoints", model, optimizer)
    for _ in checkpointer.epochs(2):
        for (batch,) in checkpointer.batches(loader):
            step = checkpointer.step
            break_down("between", step)
            optimizer.zero_grad()
            loss = Gate.apply(model(batch), step).square().mean()
            loss.backward()
            optimizer.step()
            with (directory / "losses").open("a") as file:
                file.write(f"{step} {loss.item()!r}\n")
    total = sum(p.double().sum().item() for p in model.state_dict().values())
    with (directory / "losses").open("a") as file:
        file.write(f"end {total!r}\n")
    break_down("exit")


main()
