"""The private directory of one run: sockets, logs and the pipes of CUDA MPS; gone when the run ends.

A run holds a lock on the file `launcher` in its directory for as long as its launcher lives, so that the
next start knows the directories of dead runs, whatever became of pids and clocks, and removes them.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mpsrun.config import MAX_WORKERS, Config, socket_address
from mpsrun.errors import UsageError
from mpsrun.launch import leftovers

RECORD = "launcher"
SECRET_BYTES = 32
_LOCK = ".lock"
_LOCK_DEADLINE_S = 2.0
_LONGEST_SOCKET = "mps/control_privileged"  # the longest name that a CUDA MPS daemon binds in its pipe directory


@contextlib.contextmanager
def private_run_dir() -> Iterator[Path]:
    """Make this run's directory (mode 0700), and remove it at the end.

    Raises UsageError where the place is not ours alone, not writable, or too long for a socket's path.
    """
    base = base_dir()
    with _locked(base / _LOCK):
        sweep(base)
        run_dir = _make(base)
        try:
            record = _take_record(run_dir)
            _write_new(Config(run_dir=run_dir).secret_file, os.urandom(SECRET_BYTES))
        except OSError as error:  # a full disk
            shutil.rmtree(run_dir, ignore_errors=True)
            raise _not_writable(base, error) from None
    try:
        yield run_dir
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
        os.close(record)


def base_dir() -> Path:
    """Return the directory that holds all runs of this user, made and checked."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        base = Path(runtime).absolute() / "mpsrun"
    else:
        base = _temporary_dir() / f"mpsrun-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _not_writable(base.parent, error) from None
    _check_ours_alone(base)
    return base


def clear_for_restart(config: Config) -> None:
    """Remove what the processes of one start have left, so that those of the next one find nothing of it."""
    assert config.run_dir is not None
    keep = {config.mps_pipe_dir, config.mps_log_dir, config.secret_file, config.run_dir / RECORD}
    for entry in config.run_dir.iterdir():
        if entry not in keep and entry.suffix != ".log":
            entry.unlink(missing_ok=True)


def sweep(base: Path) -> None:
    """End what runs whose launcher is dead have left, and remove their directories."""
    for entry in base.iterdir():
        if entry.is_dir() and not entry.is_symlink() and _is_dead(entry):
            leftovers.clear(entry)


def _temporary_dir() -> Path:
    try:
        return Path(tempfile.gettempdir()).absolute()
    except FileNotFoundError as error:
        raise UsageError(f"expected a writable directory for this run, found none ({error}); set TMPDIR") from None


def _check_ours_alone(base: Path) -> None:
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else f"one of user {found.st_uid}"
        raise UsageError(
            f"expected {base} to be a directory of user {os.getuid()}, found {what}; "
            "remove it, or set XDG_RUNTIME_DIR or TMPDIR"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        base.chmod(0o700)


def _make(base: Path) -> Path:
    try:
        run_dir = Path(tempfile.mkdtemp(prefix="", dir=base))
    except OSError as error:
        raise _not_writable(base, error) from None
    try:
        Config(run_dir=run_dir).worker_socket(MAX_WORKERS)
        socket_address(run_dir / _LONGEST_SOCKET)
    except UsageError:
        run_dir.rmdir()
        raise
    return run_dir


def _not_writable(directory: Path, error: OSError) -> UsageError:
    return UsageError(
        f"expected a run directory that can be written, found {directory}: {error.strerror}; "
        "set XDG_RUNTIME_DIR or TMPDIR to a directory that you can write"
    )


def _take_record(run_dir: Path) -> int:
    """Write who we are, and return a descriptor whose lock says that we live; no child inherits it."""
    record = os.open(run_dir / RECORD, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(record, f"pid {os.getpid()}\nstarted {time.time():.3f}\n".encode())
    return record


def _write_new(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)


def _is_dead(run_dir: Path) -> bool:
    try:
        record = os.open(run_dir / RECORD, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # its launcher was killed after it made the directory: it makes both under the same lock
    except OSError:
        return False
    try:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(record)
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other launchers from sweeping meanwhile; one that is stopped delays us for two seconds."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    deadline = time.monotonic() + _LOCK_DEADLINE_S
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
