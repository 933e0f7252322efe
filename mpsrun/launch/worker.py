"""The start of a worker process: tied to its parent before torch is imported."""

import faulthandler
import signal
import sys
from collections.abc import Sequence

from mpsrun.config import STACKS_SIGNAL
from mpsrun.launch.family import tie_to_parent, welcome_signals


def main(args: Sequence[str]) -> int:
    """Run worker `args[0]`, generation `args[1]` if given, until the lead ends it; returns the exit status."""
    mask = tie_to_parent()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script, which may still need its branches
    welcome_signals(mask)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    from mpsrun.run import worker

    worker.main(int(args[0]), int(args[1]) if args[1:] else 0)
    return 0
