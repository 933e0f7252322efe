"""The start of a worker process: tied to its parent before torch is imported."""

import faulthandler
import signal
import sys
from collections.abc import Sequence

from mpsrun.launch.family import tie_to_parent, welcome_signals


def main(args: Sequence[str]) -> int:
    """Run worker `args[0]` until the lead ends it; returns the exit status."""
    mask = tie_to_parent()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script, which may still need its branches
    welcome_signals(mask)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    from mpsrun.run import worker

    worker.main(int(args[0]))
    return 0
