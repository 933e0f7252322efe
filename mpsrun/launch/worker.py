"""The start of a worker process: tied to its parent before torch is imported."""

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mpsrun.config import STACKS_SIGNAL
from mpsrun.launch.family import tie_to_parent, welcome_signals


def main(args: Sequence[str]) -> int:
    """Run worker `args[0]`, generation `args[1]` if given, until the lead ends it; returns the exit status."""
    mask = tie_to_parent()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script, which may still need its branches
    signal.signal(signal.SIGTERM, _drain_and_end)
    welcome_signals(mask)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    from mpsrun.run import worker

    worker.main(int(args[0]), int(args[1]) if args[1:] else 0)
    return 0


def _drain_and_end(number: int, _: FrameType | None) -> None:
    """End once the GPU has done what it was given: a client of CUDA MPS that dies with a running kernel harms others.

    Where that waits for a lead that is gone, the launcher has CUDA MPS let go of this process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    os._exit(128 + number)
