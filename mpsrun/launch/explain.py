"""`mpsrun explain` around the script: stdout is kept for the explanation, which is written when the script ends."""

import atexit
import os
import sys

from mpsrun.config import Config, Explain
from mpsrun.log import say


def at_exit(ours: Config) -> None:
    """Send the script's stdout to stderr, and write the explanation to the real one when this process ends."""
    if sys.__stdout__ is None:  # closed, as under `>&-`: nobody is there to read
        return
    out = os.dup(1)
    os.dup2(2, 1)
    atexit.register(_write, ours.explain, out, os.getpid())


def stop_after(steps: int) -> None:
    """End the script with status 0 after so many steps of its optimizers; torch has been imported."""
    from mpsrun.run import explain

    explain.stop_after(steps)


def _write(form: Explain, out: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked child has a copy
        return
    from mpsrun.run.explanation import Explanation

    explanation = Explanation()
    if "mpsrun.run.explain" in sys.modules:
        from mpsrun.run.explain import of_script

        explanation = of_script()
    text = explanation.to_json() if form == "json" else str(explanation)
    try:
        with os.fdopen(out, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except OSError as error:  # the reader went away
        say(f"expected to write the explanation to stdout, found: {error}; the run itself is complete")
