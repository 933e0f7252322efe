"""Who uses the daemon: server state, clients by pid and command, their part of the SMs, their memory."""

import time
from collections.abc import Mapping

import msgspec

from mpsrun.mps.control import Control, ControlError
from mpsrun.mps.identity import command_of, strings_of
from mpsrun.mps.places import Places

_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
# the states that the control program documents
_SERVER_STATES = ("INITIALIZING", "ACTIVE", "FAULT")


class ClientStatus(msgspec.Struct, frozen=True):
    """sm_share: percent of the SMs that it may use, None where that is not to be told; memory_mib likewise."""

    pid: int
    command: str
    sm_share: float | None
    memory_mib: int | None


class ServerStatus(msgspec.Struct, frozen=True):
    """state: as the control daemon says, ACTIVE, INITIALIZING or FAULT; `unknown` where it says nothing of the kind."""

    pid: int
    state: str
    sm_share: float | None
    clients: tuple[ClientStatus, ...]


class Status(msgspec.Struct, frozen=True):
    """phase: what the daemon does, `stopped` where there is none. problem: what could not be found out."""

    phase: str
    since_s: float | None = None
    pid: int | None = None
    control_pid: int | None = None
    pipe_directory: str = ""
    log_directory: str = ""
    faults: int = 0
    last_fault: str = ""
    servers: tuple[ServerStatus, ...] = ()
    problem: str = ""

    @property
    def is_running(self) -> bool:
        return self.phase != "stopped"

    def __str__(self) -> str:
        """Return lines for people."""
        if not self.is_running:
            return "stopped"
        seconds = max(0.0, time.time() - (self.since_s or time.time()))
        lines = [
            f"{self.phase} for {_duration(seconds)}, pid {self.pid}, faults {self.faults}"
            + (f" (last: {self.last_fault})" if self.last_fault else ""),
            f"control daemon  pid {self.control_pid or '-'}, CUDA_MPS_PIPE_DIRECTORY={self.pipe_directory}",
            f"logs            {self.log_directory}",
        ]
        for server in self.servers:
            lines.append(f"server          pid {server.pid}, {server.state}, {_percent(server.sm_share)} of the SMs")
            lines += [
                f"  client        pid {client.pid}, {_percent(client.sm_share)} of the SMs, "
                f"{_mib(client.memory_mib)}, {client.command or 'another user'}"
                for client in server.clients
            ] or ["  no clients"]
        if not self.servers:
            lines.append("server          none, the first client starts one")
        return "\n".join([*lines, *([f"problem         {self.problem}"] if self.problem else [])])


def status(places: Places, memory_mib: Mapping[int, int]) -> Status:
    """Ask daemon and control daemon. memory_mib: by pid, what NVML tells."""
    if not places.is_running():
        return Status("stopped")
    record = places.record()
    if record is None:
        return Status("starting", pipe_directory=str(places.pipe_dir), log_directory=str(places.log_dir))
    servers: tuple[ServerStatus, ...] = ()
    problem = ""
    try:
        servers = _servers(Control(places.pipe_dir), memory_mib)
    except ControlError as error:
        problem = str(error)
    return Status(
        phase=record.phase,
        since_s=record.since_s,
        pid=record.daemon.pid,
        control_pid=record.control.pid if record.control is not None else None,
        pipe_directory=str(places.pipe_dir),
        log_directory=str(places.log_dir),
        faults=record.faults,
        last_fault=record.why,
        servers=servers,
        problem=problem,
    )


def _servers(control: Control, memory_mib: Mapping[int, int]) -> tuple[ServerStatus, ...]:
    found = []
    for pid in control.server_list():
        state = control.server_status(pid)
        share = control.share_percent(pid)
        clients = tuple(
            ClientStatus(client, command_of(client), _share_of(client, share), memory_mib.get(client))
            for client in control.client_list(pid)
        )
        found.append(ServerStatus(pid, state if state in _SERVER_STATES else "unknown", share, clients))
    return tuple(found)


def _share_of(pid: int, server_percent: float) -> float | None:
    """Return the smaller of a client's own setting and its server's; None where its environment is not ours to see."""
    words = strings_of(pid, "environ")
    if not words:
        return None
    own = next((word.partition("=")[2] for word in words if word.startswith(f"{_SHARE}=")), "")
    try:
        return min(float(own), server_percent)
    except ValueError:  # it has none, or different ones for different GPUs
        return server_percent


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _percent(value: float | None) -> str:
    return "unknown part" if value is None else f"{value:g} %"


def _mib(value: int | None) -> str:
    return "memory unknown" if value is None else f"{value} MiB"
