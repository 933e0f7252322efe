"""Plans that outlive a run: the cache of the user, a file that pins them, a file that takes them."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mpsrun import __version__, config, log
from mpsrun.errors import UsageError
from mpsrun.graph.regions import Region
from mpsrun.plan.plan import Means, Plan
from mpsrun.plan.planfile import PlanFile, fits
from mpsrun.run import state as modes
from mpsrun.run.plan_cache import Key, PlanCache

_saved = PlanFile()


def key_of(gm: fx.GraphModule, args: Sequence[Any], kind: str, workers: int) -> Key:
    """Everything on which the fastest plan of a graph depends, for the sizes of these arguments."""
    shapes = [_shape(arg) for arg in args]
    options = config.current()
    asked = {"tuned": options.tune_convolutions, "compiled": options.compile_branches}
    asked[f"channels last {options.channels_last}"] = options.channels_last != "auto"
    asked[f"worker share {options.worker_share}"] = options.worker_share is not None
    return Key(
        graph=_digest(gm.code),
        shapes=_digest(repr((shapes, modes.ambient(kind)))),
        device=torch.cuda.get_device_name() if kind == "cuda" else kind,
        driver=str(torch.version.cuda) if kind == "cuda" else "",
        torch=str(torch.__version__),
        mpsrun=__version__,
        workers=workers,
        mps=options.mps,
        asked=tuple(name for name, is_asked in asked.items() if is_asked),
    )


def fingerprint(key: Key) -> str:
    """What a plan file calls a graph: the graph with its sizes, whatever machine it runs on."""
    return _digest(key.graph + key.shapes)


def cache() -> PlanCache:
    """The cache of this user, where the environment says that it is now."""
    return PlanCache(config.current().plan_cache_dir)


def pinned(name: str, regions: Sequence[Region], workers: int, means: Means) -> Plan | None:
    """The plan that `--plan` pins for the graph of this fingerprint; None, with one line why, where there is none."""
    known = pins()
    if known is None:
        return None
    try:
        plan = known.plan_for(name)
    except UsageError as error:
        log.say(f"{error}; it is tuned instead")
        return None
    reason = fits(plan, regions, workers, means)
    if reason is not None:
        log.say(f"{known.source}: the plan of graph {name} cannot be followed: {reason}; it is tuned instead")
        return None
    return plan


def keep(name: str, description: str, plan: Plan) -> None:
    """Note the plan that a graph ended up with, for `--save-plan`."""
    global _saved
    if config.current().save_plan is not None:
        _saved = _saved.with_plan(name, description, plan)


def save_at_exit() -> None:
    """Have the plans written once the script has ended."""
    atexit.register(_write, os.getpid())


def _write(pid: int) -> None:
    path = config.current().save_plan
    if path is None or os.getpid() != pid:  # a forked child has a copy
        return
    if not _saved.graphs:
        log.say(f"no plan was written to {path}: there was nothing to plan in any network (--verbose says why)")
        return
    try:
        path.write_text(str(_saved))
    except OSError as error:
        log.say(f"expected to write the plan to {path}, found: {error}; the run itself is complete")


@functools.cache
def pins() -> PlanFile | None:
    """The plans that `--plan` names; raises `UsageError` where they cannot be read."""
    path = config.current().plan
    if path is None:
        return None
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a plan in {path}, found none: {error}; write one with --save-plan") from error
    return PlanFile.parse(text, str(path))


def _shape(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg if type(arg) in (int, float, bool) else type(arg).__name__
    return tuple(arg.shape), str(arg.dtype), arg.requires_grad


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
