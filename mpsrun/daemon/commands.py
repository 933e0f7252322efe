"""`mpsrun daemon run|start|stop|status`: the command line of the daemon."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mpsrun.checkout import with_package
from mpsrun.daemon import run
from mpsrun.daemon.settings import Settings
from mpsrun.daemon.status import Status, status
from mpsrun.errors import MpsrunError, UsageError
from mpsrun.log import say
from mpsrun.mps.places import Places
from mpsrun.mps.surroundings import first_obstacle_to_daemon

HELP = """\
usage: mpsrun daemon run [--config FILE] [--system]      in the foreground, as a service manager wants it
       mpsrun daemon start [--config FILE] [--system]    in the background; returns once it is ready
       mpsrun daemon stop [--force] [--system]           refused while clients run, but with --force
       mpsrun daemon status [--json] [--system]          exit status 0 where it is ready, else 3

Owns a CUDA MPS daemon: starts it, watches it, starts it again after a fault, rotates its logs. Runs of the same user
use it. --system: with /run/mpsrun, /var/log/mpsrun and /etc/mpsrun/daemon.toml instead of the user's directories.
"""
NOT_RUNNING = 3  # as the Linux Standard Base wants it of a status command
START_S = 20.0
STOP_S = 15.0
_ALLOWED = {
    "run": {"--config", "--system"},
    "start": {"--config", "--system"},
    "stop": {"--force", "--system"},
    "status": {"--json", "--system"},
}


@dataclass(frozen=True)
class _Request:
    command: str
    places: Places
    config: Path | None
    flags: frozenset[str]

    def settings(self) -> Settings:
        return Settings.read(self.config or self.places.config_file, must_exist=self.config is not None)


def main(words: Sequence[str]) -> int:
    """Run `mpsrun daemon WORDS`; returns the exit status: 0, 1 for what could not be done, 3 where nothing runs.

    Raises UsageError for wrong use.
    """
    if not words or {"--help", "-h"} & set(words):
        print(HELP, end="")
        return 0 if words else 2
    request = _parse(words)
    try:
        return {"run": _run, "start": _start, "stop": _stop, "status": _status}[request.command](request)
    except UsageError:
        raise
    except MpsrunError as error:
        say(str(error))
        return 1


def _parse(words: Sequence[str]) -> _Request:
    command, *rest = words
    if command not in _ALLOWED:
        raise UsageError(f"expected mpsrun daemon run|start|stop|status, found {command!r}; see mpsrun daemon --help")
    flags: set[str] = set()
    config = None
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in _ALLOWED[command] or (equals and name != "--config"):
            known = ", ".join(sorted(_ALLOWED[command]))
            raise UsageError(f"expected an option of mpsrun daemon {command} ({known}), found {name!r}; leave it out")
        if name != "--config":
            flags.add(name)
            continue
        if not equals and not rest:
            raise UsageError("expected a file after --config, found none; name one")
        config = Path(value if equals else rest.pop(0)).absolute()
    places = Places.system() if "--system" in flags else Places.user()
    return _Request(command, places, config, frozenset(flags))


def _run(request: _Request) -> int:
    settings = request.settings()
    if obstacle := first_obstacle_to_daemon(bool(settings.gpus)):
        raise MpsrunError(str(obstacle))
    return run.run(request.places, settings)


def _start(request: _Request) -> int:
    request.settings()
    if obstacle := first_obstacle_to_daemon(has_gpus_chosen=True):
        raise MpsrunError(str(obstacle))
    places = request.places
    if places.is_running():
        raise MpsrunError(f"expected no running daemon, found one in {places.runtime_dir}; see mpsrun daemon status")
    places.make()
    with places.own_log.open("ab") as log:
        begin = log.tell()
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "mpsrun", "daemon", "run", *_passed_on(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=with_package(os.environ),
            cwd="/",
        )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        record = places.record()
        if record is not None and record.daemon.pid == daemon.pid and record.phase == "ready":
            say(f"the daemon is ready (pid {daemon.pid}); its log is {places.own_log}")
            return 0
        if daemon.poll() is not None:
            raise MpsrunError(f"the daemon ended at its start: {_said(places.own_log, begin)}")
        time.sleep(0.02)
    daemon.terminate()
    daemon.wait(STOP_S)
    raise MpsrunError(f"the daemon was not ready within {START_S:g} s: {_said(places.own_log, begin)}")


def _stop(request: _Request) -> int:
    places = request.places
    record = places.record()
    if record is None:
        if not places.is_running():
            say("no daemon runs")
            return 0
        raise MpsrunError(f"the daemon in {places.runtime_dir} is only just starting; try again")
    if "--force" not in request.flags:
        _refuse_with_clients(status(places, {}))
    record.daemon.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while places.is_running():
        if time.monotonic() > deadline:
            raise MpsrunError(f"the daemon (pid {record.daemon.pid}) did not end within {STOP_S:g} s; see its log")
        time.sleep(0.02)
    return 0


def _refuse_with_clients(found: Status) -> None:
    clients = [client for server in found.servers for client in server.clients]
    if clients:
        told = "; ".join(f"pid {client.pid} ({client.command or 'another user'})" for client in clients[:5])
        raise MpsrunError(
            f"expected no clients of the daemon, found {len(clients)}: {told}; end them first, or use --force, "
            "which takes the GPU away from them"
        )
    if found.problem or found.phase == "draining":
        why = found.problem or found.last_fault
        raise MpsrunError(f"it cannot be told whether clients run ({why}); use --force to stop the daemon all the same")


def _status(request: _Request) -> int:
    from mpsrun.monitor.nvml import memory_by_pid

    found = status(request.places, memory_by_pid())
    print(msgspec.json.encode(found).decode() if "--json" in request.flags else found)
    return 0 if found.phase == "ready" else NOT_RUNNING


def _passed_on(request: _Request) -> list[str]:
    system = ["--system"] if "--system" in request.flags else []
    return [*system, *(["--config", str(request.config)] if request.config is not None else [])]


def _said(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("mpsrun: ") if lines else "it said nothing"
