"""When the group is started again, and what the script is told of it."""

import os
from collections.abc import Mapping

from mpsrun.config import Config
from mpsrun.launch.group import Outcome

WRONG_USE = 2  # of the script as of mpsrun: the next start would end the same way
DIFFERENT = 4  # --verify found a difference


def may_restart(outcome: Outcome) -> bool:
    """Return whether another start can help: the script failed, nobody wanted it to end, and it could start at all."""
    return outcome.returncode not in (0, WRONG_USE, DIFFERENT) and not outcome.asked


def is_told(outcome: Outcome, config: Config) -> bool:
    """Return whether a failed run gets a report: not where the script alone failed, and ends as it would by itself."""
    if outcome.returncode == 0 or outcome.asked or not outcome.failures:
        return False
    has_lanes = config.worker_count() > 0 and any(failed.crashed for failed in outcome.failures)
    return has_lanes or config.max_restarts > 0 or any(f.role != "lead" or f.fault for f in outcome.failures)


def environment(count: int, max_restarts: int, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that tell the script how often it was started before; none without `--max-restarts`.

    Scripts written for torchrun read TORCHELASTIC_*; under torchrun these stay torchrun's own. TORCHELASTIC_RUN_ID is
    not set: it would announce a process group.
    """
    if not max_restarts:
        return {}
    counts = {"RESTART_COUNT": str(count), "MAX_RESTARTS": str(max_restarts)}
    as_torchrun = {f"TORCHELASTIC_{name}": value for name, value in counts.items()}
    ours = {f"MPSRUN_{name}": value for name, value in counts.items()}
    return ours | {name: value for name, value in as_torchrun.items() if name not in outer}
