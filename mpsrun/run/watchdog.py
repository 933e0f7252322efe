"""What is known when a wait for a worker runs out: every process's Python stacks and every counter, as one text."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from mpsrun import log
from mpsrun.config import STACKS_SIGNAL, Config
from mpsrun.run.link import STEP, Link, Replayed, Work

STACKS_S = 1.0  # for the workers to write their stacks
_QUIET_S = 0.1  # after which a log that grew is taken for complete
_MOST_OWED = 8  # pieces of work that are named


def tell(settings: Config, reason: str, links: Sequence[Link], counters: Sequence[int] | None, state: str) -> None:
    """Write the report into the log directory, or to stderr where there is none. Takes about a second.

    counters: as they stand, None where they cannot be read. state: what the coordinator says of itself.
    """
    text = report(settings, reason, links, counters, state)
    path = settings.watchdog_log
    if path is not None:
        try:
            with path.open("a") as file:
                file.write(text)
        except OSError as error:
            log.say(f"expected to write a report to {path}, found: {error}")
        else:
            log.say(f"{reason}; all stacks and counters are in {path}")
            return
    log.say(text.rstrip())


def report(settings: Config, reason: str, links: Sequence[Link], counters: Sequence[int] | None, state: str) -> str:
    """The whole text: why, one line for each worker and one for the lead, then the stacks of all of them."""
    parts = [f"watchdog, {time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}", f"lead (pid {os.getpid()}): {state}"]
    parts += [describe(link, counters) for link in links]
    stacks = _stacks_of_workers(settings, links)
    parts += [f"--- stacks of the lead (pid {os.getpid()})", own_stacks().rstrip()]
    for link in links:
        parts += [f"--- stacks of worker {link.index} (pid {link.pid})", stacks.get(link.index, "(none)").rstrip()]
    return "\n".join(parts) + "\n--- end of the report\n"


def describe(link: Link, counters: Sequence[int] | None) -> str:
    """One worker: what its process does, what it owes, how far its counter is."""
    life = f"lost: {link.lost}" if link.lost is not None else "started" if link.started else "has not started"
    owed = list(link.owed)
    found = [
        f"generation {link.generation}, {life}, the process is {_status(link.pid)}",
        f"counter {link.done} at {counters[link.done] if counters is not None else 'unknown'}, last work {link.last}",
        *(_step(link, owed[0], counters) if owed and counters is not None else ()),
        f"owes {_works(owed)}" + (f", the first for {link.stalled_s():.1f} s" if owed else ""),
    ]
    if link.preparing:
        layouts = ", ".join(map(str, link.preparing))
        found.append(f"prepares layouts {layouts} for {link.preparing_s():.1f} s")
    if link.refused:
        found.append(f"had no memory for {sorted(link.refused)}")
    found.append(f"{link.unread_bytes()} bytes unread in its ring")
    return f"worker {link.index} (pid {link.pid}): {'; '.join(found)}"


def _step(link: Link, work: Work | Replayed, counters: Sequence[int]) -> Sequence[str]:
    """How far a replay is."""
    if isinstance(work, Work):
        return ()
    return (f"step {counters[link.progress]} of {counters[STEP]} that are released",)


def own_stacks() -> str:
    """The Python stack of each thread of this process, as faulthandler writes them: the last call first."""
    descriptor = os.memfd_create("mpsrun-stacks", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _stacks_of_workers(settings: Config, links: Sequence[Link]) -> dict[int, str]:
    """What each worker writes into its log when it is asked to, whatever it is at; nothing where it is stopped."""
    logs = {link.index: settings.worker_log(link.index) for link in links if link.started}
    before = {index: _size(path) for index, path in logs.items()}
    asked = {link.index for link in links if link.index in logs and link.signal(STACKS_SIGNAL)}
    start = changed = time.monotonic()
    sizes = before
    while (now := time.monotonic()) - start < STACKS_S:
        found = {index: _size(path) for index, path in logs.items()}
        if found != sizes:
            sizes, changed = found, now
        if now - changed > _QUIET_S and all(sizes[index] > before[index] for index in asked):
            break
        time.sleep(0.01)
    return {index: _after(logs[index], before[index]) or "(it wrote none)" for index in asked}


def _works(owed: Sequence[Work | Replayed]) -> str:
    names = [f"{type(work.message).__name__.lower()} {work.seq}" for work in owed[:_MOST_OWED]]
    more = f" and {len(owed) - _MOST_OWED} more" if len(owed) > _MOST_OWED else ""
    return (", ".join(names) or "nothing") + more


def _status(pid: int | None) -> str:
    try:
        return str(psutil.Process(pid).status()) if pid is not None else "not known"
    except psutil.NoSuchProcess:
        return "gone"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _after(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"({error})"
