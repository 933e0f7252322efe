"""The start of the lead: the process that runs the user's script."""

import atexit
import os
from collections.abc import Sequence

from mpsrun import config
from mpsrun.config import ENV_CONFIG, Config
from mpsrun.errors import UsageError
from mpsrun.launch import explain, script
from mpsrun.launch.error_file import leave_error
from mpsrun.launch.family import tie_to_parent, welcome_signals
from mpsrun.launch.hardware import detect
from mpsrun.launch.on_import import after_import
from mpsrun.launch.target import Target
from mpsrun.log import say


def main(args: Sequence[str]) -> int:
    """Run the script `args` in this process; returns 0 where it neither raises nor exits."""
    mask = tie_to_parent()
    ours = config.current()
    os.environ.pop(ENV_CONFIG, None)  # processes that the script starts are none of ours
    if ours.explain:
        explain.at_exit(ours)
    if ours.lanes != "serial":
        after_import("torch", lambda: _watch_for_networks(ours))
    errors = ours.error_file("lead")
    script.run(Target.from_argv(args), lambda: welcome_signals(mask), lambda error: leave_error(errors, error))
    return 0


def _watch_for_networks(ours: Config) -> None:
    if ours.run_dir is not None:
        ours.capture_marker.touch()
    if ours.plan is not None:
        _check_plan()
    if ours.verify:
        from mpsrun.run import verify

        atexit.register(verify.say_rest)
    if ours.save_plan is not None:
        from mpsrun.run import plans

        plans.save_at_exit()
    if ours.explain:
        explain.stop_after(ours.steps)
    if ours.capture == "off":
        return
    try:
        from mpsrun.run.discover import install

        install(_why_none(ours))
    except Exception as error:
        if ours.strict:
            raise
        say(f"cannot watch for networks, so the script runs plain ({type(error).__name__}: {error})")


def _why_none(ours: Config) -> str | None:
    """Why no plan but the plain one will be tried for any network, so that none need be compiled; None otherwise."""
    asks = ours.plan or ours.trace or ours.explain or ours.verify or ours.verbose or ours.adapt == "on"
    hardware = detect()
    return hardware.reason if hardware.kind == "cpu" and ours.lanes == "auto" and not asks else None


def _check_plan() -> None:
    """End the script with status 2 where the file that `--plan` names is not a plan."""
    from mpsrun.run import plans

    try:
        plans.pins()
    except UsageError as error:
        say(str(error))
        raise SystemExit(2) from None
