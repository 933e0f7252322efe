"""The command line: `mpsrun [options] train.py [args...]`."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mpsrun import __version__
from mpsrun.config import AUTO_WORKERS, MAX_WORKERS, WORKER_LANES, Capture, Config, Lanes, Switch
from mpsrun.errors import UsageError
from mpsrun.launch.target import Target
from mpsrun.log import say

HELP = """\
usage: mpsrun [options] train.py [args...]
       mpsrun [options] -m package.module [args...]
       mpsrun explain [options] train.py [args...]
       mpsrun daemon run|start|stop|status
       mpsrun doctor [--json]

Runs a PyTorch training script with the independent branches of its network at the same time on one GPU.
Options before the script are mpsrun's; everything after it is the script's.

  --workers N|auto             worker processes (default auto: at most 4, one core left to the script)
  --lanes auto|serial|streams|captured|workers|captured-workers
                               where branches run: auto measures; the others force every branch that may leave the
                               script's own stream to side streams or to worker processes, or none; captured: as
                               CUDA graphs
  --worker-share PERCENT       start each worker with this part of the GPU's multiprocessors, by CUDA MPS; without it
                               plans may give workers shares, and change them
  --mps auto|on|off            CUDA MPS: start or join a daemon, insist on it, or do without
  --capture auto|off           compile the script's networks in place, or only what asks for backend="mpsrun"
  --log-dir DIR                keep the logs of the workers and of CUDA MPS there, and the watchdog's reports
  --timeout SECONDS            the watchdog of every wait for a worker (default 30)
  --plan FILE                  follow the plan in this file instead of tuning
  --save-plan FILE             write the plan that each network ends up with
  --verify N                   compute the first N steps on lanes plainly, too; stop with status 4 where they differ
  --adapt auto|on|off          change the plan when other load, heat or missing memory make another one faster;
                               auto: on a GPU
  --trace FILE                 append what was sampled of the GPU and, with --lanes auto, every step and every
                               decision, as JSON lines
  --channels-last auto|on|off  auto: try a captured plan whose convolutions, and what lies between them, have the
                               channels last in memory; on: all plans that are captured without workers have
  --tune-convolutions          try a plan whose convolutions have the algorithms that are fastest beside each other;
                               takes seconds more at the start, and results may then differ by rounding
  --compile-branches           try a plan whose workers compile their branches with torch's Inductor, or with --lanes
                               workers or captured-workers do so; takes up to minutes more, and results then differ
                               by rounding
  --max-restarts N             start the script again after a failure, N times at most (default 0); it should go on
                               from a checkpoint, see mpsrun.Checkpointer
  --strict                     raise a worker's error or lack of memory in the script instead of computing its branch
                               there
  --verbose                    say what was found, refused and why, and at the end which branch ran where
  --version, --help

`mpsrun explain` prints the branches of the script's networks with their times alone, what could be gained, and the
plan. What the script writes to stdout goes to stderr. A script of this name runs with `mpsrun ./explain`.

  --json                       as one JSON object instead of a tree
  --steps N                    stop the script after N steps of its optimizers (default 120)

`mpsrun daemon` owns a CUDA MPS daemon which all runs of a user share: see mpsrun daemon --help. `mpsrun doctor` checks
what mpsrun needs on this machine, and says how to fix what is missing; exit status 1 where something fails.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for wrong use."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["daemon"]:
            from mpsrun.daemon import commands

            return commands.main(words[1:])
        if words[:1] == ["doctor"]:
            from mpsrun.doctor import command

            return command.main(words[1:])
        if _asks_for(words, "--version"):
            print(f"mpsrun {__version__}")
            return 0
        if _asks_for(words, "--help", "-h"):
            print(HELP, end="")
            return 0
        config, target = parse(words)
        target.check()
        return _launch(config, target)
    except UsageError as error:
        say(str(error))
        return 2


def main_of_child(argv: Sequence[str]) -> int:
    """Run as one of the processes that the launcher starts, otherwise as the command line."""
    from mpsrun.launch.family import is_child

    if not is_child(os.environ):
        return main(argv)
    role, *args = argv
    if role == "lead":
        from mpsrun.launch import lead

        return lead.main(args)
    if role == "worker":
        from mpsrun.launch import worker

        return worker.main(args)
    if role == "keeper":
        from mpsrun.launch import keeper

        return keeper.main(args)
    from mpsrun.launch.family import tie_to_parent
    from mpsrun.mps import guard

    tie_to_parent(guard.DEATH_SIGNAL)
    return guard.main(args)


def parse(words: Sequence[str]) -> tuple[Config, Target]:
    """Split the command line into mpsrun's configuration and the script with its arguments."""
    rest = list(words)
    values: dict[str, Any] = {}
    if _explains(rest):
        rest.pop(0)
        values["explain"] = "text"
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "-m", "--"):
        name, equals, value = rest.pop(0).partition("=")
        field, read = _option(name, "explain" in values)
        if read is None:
            if equals:
                raise UsageError(f"expected {name} alone, found {name}={value}; leave the value out")
            values[field] = "json" if name == "--json" else True
            continue
        if not equals:
            if not rest:
                raise UsageError(f"expected a value after {name}, found none; see mpsrun --help")
            value = rest.pop(0)
        values[field] = read(name, value)
    if values.get("worker_share") is not None and values.get("mps") == "off":
        raise UsageError("expected CUDA MPS for --worker-share, found --mps off; leave one of the two out")
    _refuse_without_effect(values)
    if values.get("verify"):
        values["channels_last"] = "off"  # what other kernels round cannot be told from a fault
    for wanted, use in (("verify", "compare for --verify"), ("explain", "explain")):
        if values.get(wanted) and values.get("lanes") == "serial":
            raise UsageError(f"expected lanes to {use}, found --lanes serial; leave one of the two out")
    return Config(**values), _target(rest)


def _refuse_without_effect(values: Mapping[str, Any]) -> None:
    """Raise UsageError for options that the lanes asked for, or one another, leave nothing to do."""
    lanes = values.get("lanes", "auto")
    for name, is_given in (
        ("--tune-convolutions", values.get("tune_convolutions")),
        ("--verify", values.get("verify")),
    ):
        if is_given and values.get("channels_last") == "on":
            raise UsageError(f"expected {name} or --channels-last on, found both; leave one of the two out")
    for name, is_given, useful in (
        ("--worker-share", values.get("worker_share") is not None, WORKER_LANES),
        ("--compile-branches", values.get("compile_branches", False), WORKER_LANES),
        ("--tune-convolutions", values.get("tune_convolutions", False), ("auto",)),
        ("--channels-last on", values.get("channels_last") == "on", ("auto", "captured")),
        ("--adapt on", values.get("adapt") == "on", ("auto",)),
        ("--plan", values.get("plan") is not None, ("auto",)),
        ("--save-plan", values.get("save_plan") is not None, _LANES_WITH_PLANS),
    ):
        if is_given and lanes not in useful:
            known = " or ".join(useful)
            raise UsageError(f"expected --lanes {known} for {name}, found --lanes {lanes}; leave one of the two out")


def _launch(config: Config, target: Target) -> int:
    from mpsrun.launch.hardware import detect

    hardware = detect()
    if hardware.kind in ("rocm", "apple"):
        from mpsrun.launch.spawn import run_plain

        if config.mps == "on":
            raise UsageError(f"expected an NVIDIA GPU for --mps on, found none ({hardware.reason}); leave it out")
        if config.explain:
            raise UsageError(f"expected a machine with lanes to explain, found none ({hardware.reason}); use another")
        say(f"{hardware.reason}, for which mpsrun has no lanes: plain run, no worker processes")
        run_plain(dataclasses.replace(config, lanes="serial"), target)
    if config.lanes == "serial":
        say("serial lanes: plain run, no worker processes")
    from mpsrun.launch.supervisor import supervise

    return supervise(config, target, hardware).follow()


def _asks_for(words: Sequence[str], *names: str) -> bool:
    """Return whether one of mpsrun's own options is in front of the script; values are no options."""
    for word in words[1:] if _explains(words) else words:
        if word in names:
            return True
        if not word.startswith("--"):
            return False
    return False


def _explains(words: Sequence[str]) -> bool:
    return list(words[:1]) == ["explain"]


def _option(name: str, explains: bool) -> tuple[str, Callable[[str, str], Any] | None]:
    field = name.removeprefix("--").replace("-", "_")
    if name.startswith("--") and field in _OF_EXPLAIN and not explains:
        usage = f"mpsrun explain {name}{'' if _OPTIONS[field] is None else ' N'} train.py"
        raise UsageError(f"expected {name} after explain only, found it without; use {usage}")
    if not name.startswith("--") or field not in _OPTIONS:
        import difflib

        near = difflib.get_close_matches(field, _OPTIONS, 1)
        advice = f"did you mean --{near[0].replace('_', '-')}?" if near else "see mpsrun --help"
        raise UsageError(f"expected an option of mpsrun or a script, found {name!r}; {advice}")
    return _FIELDS.get(field, field), _OPTIONS[field]


def _target(rest: Sequence[str]) -> Target:
    words = list(rest[1:] if rest[:1] == ["--"] else rest)
    if not words or words == ["-m"] or words[0] == "-":
        found = "nothing after -m" if words == ["-m"] else "standard input" if words else "none"
        raise UsageError(f"expected a script or -m module, found {found}; usage: mpsrun [options] train.py [args...]")
    if words[0] in _COMMANDS and rest[0] != "--" and not Path(words[0]).exists():
        raise UsageError(
            f"expected a script, found {words[0]} behind options; it comes first: mpsrun {words[0]} [options]"
        )
    return Target.from_argv(words)


def _choice(*choices: str) -> Callable[[str, str], str]:
    def read(name: str, value: str) -> str:
        if value not in choices:
            raise UsageError(f"expected {name} {'|'.join(choices)}, found {value!r}; choose one of these")
        return value

    return read


def _workers(name: str, value: str) -> int | None:
    if value == "auto":
        return None
    if not 1 <= _whole(value) <= MAX_WORKERS:
        advice = "to run without workers use --lanes serial" if value == "0" else f"auto takes at most {AUTO_WORKERS}"
        raise UsageError(f"expected {name} auto or a number from 1 to {MAX_WORKERS}, found {value[:80]!r}; {advice}")
    return int(value)


def _whole(value: str) -> int:
    """A number of digits and nothing else; -1 for anything else, or more than fit into 64 bits."""
    return int(value) if value.isascii() and value.isdigit() and len(value) < len(str(sys.maxsize)) else -1


def _number(least: int, most: int, advice: str) -> Callable[[str, str], int]:
    def read(name: str, value: str) -> int:
        if not least <= _whole(value) <= most:
            span = f"from {least}" + (f" to {most}" if most < sys.maxsize else "")
            raise UsageError(f"expected {name} with a whole number {span}, found {value[:80]!r}; {advice}")
        return int(value)

    return read


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"expected {name} with a number of seconds above 0, found {value!r}; the default is 30")
    return seconds


def _path(name: str, value: str) -> Path:
    if not value:
        raise UsageError(f"expected {name} with a directory, found an empty name; name one or leave {name} out")
    return Path(value).absolute()


def _plan_file(name: str, value: str) -> Path:
    path = Path(value).absolute()
    if not value or not path.is_file():
        raise UsageError(
            f"expected {name} with a file that --save-plan wrote, found none at {value!r}; write one first"
        )
    return path


def _path_of_a_file(name: str, value: str) -> Path:
    path = Path(value).absolute()
    if not value or path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"expected {name} with a file in a directory that is there, found {value!r}; name another")
    return path


_FIELDS = {"timeout": "timeout_s", "json": "explain"}
_OF_EXPLAIN = ("json", "steps")
_LANES_WITH_PLANS = tuple(kind for kind in get_args(Lanes) if kind != "serial")
_COMMANDS = ("explain", "doctor", "daemon")
_OPTIONS: dict[str, Callable[[str, str], Any] | None] = {
    "workers": _workers,
    "lanes": _choice(*get_args(Lanes)),
    "mps": _choice(*get_args(Switch)),
    "capture": _choice(*get_args(Capture)),
    "log_dir": _path,
    "timeout": _seconds,
    "plan": _plan_file,
    "save_plan": _path_of_a_file,
    "verify": _number(1, sys.maxsize, "3 is enough for most scripts"),
    "steps": _number(1, sys.maxsize, "120 are the default"),
    "max_restarts": _number(0, sys.maxsize, "3 is enough for most runs"),
    "adapt": _choice(*get_args(Switch)),
    "trace": _path_of_a_file,
    "worker_share": _number(1, 100, "try 50"),
    "channels_last": _choice(*get_args(Switch)),
    "tune_convolutions": None,
    "compile_branches": None,
    "json": None,
    "strict": None,
    "verbose": None,
}
