"""Which CUDA MPS daemon a run joins: the one that CUDA_MPS_PIPE_DIRECTORY names, the user's own, the default one."""

import os
import time
from pathlib import Path

from mpsrun.log import say
from mpsrun.mps.control import DEFAULT_PIPE_DIR, PIPE_DIRECTORY, Control
from mpsrun.mps.places import Places
from mpsrun.mps.surroundings import first_obstacle_to_joining

WAIT_S = 6.0  # for the user's own daemon, while it starts its CUDA MPS again
_POLL_S = 0.05


def daemon_to_join() -> Path | None:
    """Return the pipe directory of a daemon that answers and takes us as clients; None where there is none.

    One line says why a daemon that was named cannot be joined.
    """
    named = os.environ.get(PIPE_DIRECTORY)
    if named and _can_be_joined(Path(named)):
        return Path(named)
    own = Places.user()
    if own.is_running() and _is_ready(own):
        return own.pipe_dir
    if not named and _can_be_joined(DEFAULT_PIPE_DIR):
        return DEFAULT_PIPE_DIR
    return None


def _can_be_joined(pipe_dir: Path) -> bool:
    if obstacle := first_obstacle_to_joining(pipe_dir):
        if os.environ.get(PIPE_DIRECTORY):
            say(str(obstacle))
        return False
    return Control(pipe_dir).is_reachable()


def _is_ready(own: Places) -> bool:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        record = own.record()
        if record is not None and record.phase == "ready":
            return Control(own.pipe_dir).is_reachable()
        if not own.is_running() or (record is not None and record.phase == "draining"):
            break
        time.sleep(_POLL_S)
    say(f"the daemon in {own.runtime_dir} is not ready (see mpsrun daemon status): going on without it")
    return False
