"""Where the daemon of a user, or of the system, has its files, and whether it runs.

A daemon holds a lock on the file `lock` for as long as it lives; what it writes into `record.json` is true while the
lock is held.
"""

import fcntl
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from mpsrun.config import socket_address
from mpsrun.errors import UsageError
from mpsrun.mps.identity import Identity

_LONGEST_SOCKET = "control_privileged"  # the longest name that a CUDA MPS daemon binds in its pipe directory
Phase = Literal["starting", "ready", "draining", "waiting", "stopping"]


class Client(msgspec.Struct, frozen=True):
    """A client of a CUDA MPS server, as seen at the daemon's last look."""

    process: Identity
    server: int


class Record(msgspec.Struct, frozen=True):
    """What a daemon says of itself.

    since_s: when the phase began (Unix time). servers, clients: as the control daemon named them in the last look.
    faults: how often control daemon or server ended or stopped answering. why: the last reason, in words.
    """

    daemon: Identity
    phase: Phase
    since_s: float
    control: Identity | None = None
    servers: tuple[Identity, ...] = ()
    clients: tuple[Client, ...] = ()
    faults: int = 0
    why: str = ""


@dataclass(frozen=True)
class Places:
    """Paths of one daemon. runtime_dir: sockets, lock and record. config_file: read where it is there."""

    runtime_dir: Path
    log_dir: Path
    config_file: Path
    is_system: bool = False

    @classmethod
    def user(cls) -> "Places":
        """Return the places of the user who runs this process."""
        import platformdirs

        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if runtime and Path(runtime).is_dir():
            runtime_dir = Path(runtime).absolute() / "mpsrun-daemon"
        else:
            runtime_dir = Path(tempfile.gettempdir()).absolute() / f"mpsrun-daemon-{os.getuid()}"
        logs = platformdirs.user_state_path("mpsrun") / "daemon"
        return cls(runtime_dir, logs, platformdirs.user_config_path("mpsrun") / "daemon.toml")

    @classmethod
    def system(cls) -> "Places":
        """Return the places of the system's daemon, as the unit in systemd/ has them."""
        return cls(Path("/run/mpsrun"), Path("/var/log/mpsrun"), Path("/etc/mpsrun/daemon.toml"), is_system=True)

    @property
    def pipe_dir(self) -> Path:
        """CUDA_MPS_PIPE_DIRECTORY."""
        return self.runtime_dir / "mps"

    @property
    def lock_file(self) -> Path:
        return self.runtime_dir / "lock"

    @property
    def record_file(self) -> Path:
        return self.runtime_dir / "record.json"

    @property
    def own_log(self) -> Path:
        """What a daemon that was started in the background says."""
        return self.log_dir / "daemon.log"

    def make(self) -> None:
        """Make the directories; UsageError where they are not ours, cannot be made, or are too long for a socket."""
        socket_address(self.pipe_dir / _LONGEST_SOCKET)
        mode = 0o755 if self.is_system else 0o700  # clients of other users come to the system's
        try:
            for directory in (self.runtime_dir, self.pipe_dir, self.log_dir):
                directory.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"expected directories that can be written, found {error.filename}: {error.strerror}; "
                "run as the user that owns them, or set XDG_RUNTIME_DIR and XDG_STATE_HOME"
            ) from None
        found = self.runtime_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UsageError(
                f"expected {self.runtime_dir} to be a directory of user {os.getuid()}, found one of user "
                f"{found.st_uid} or a link; remove it, or set XDG_RUNTIME_DIR"
            )

    def take(self) -> int | None:
        """Return a descriptor that holds the lock until it is closed; None where a daemon holds it."""
        lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return lock

    def is_running(self) -> bool:
        """Return whether a daemon holds the lock."""
        try:
            lock = os.open(self.lock_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    def record(self) -> Record | None:
        """Return what the running daemon says of itself; None where none runs, or it has said nothing yet."""
        found = self.last_record()
        return found if found is not None and self.is_running() and found.daemon.lives else None

    def last_record(self) -> Record | None:
        """Return what was written last, by a daemon that may have ended."""
        try:
            return msgspec.json.decode(self.record_file.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, record: Record) -> None:
        """Replace the record, in one piece. A full disk leaves the old one."""
        part = self.record_file.with_suffix(".part")
        try:
            part.write_bytes(msgspec.json.encode(record))
            part.replace(self.record_file)
        except OSError:
            part.unlink(missing_ok=True)
