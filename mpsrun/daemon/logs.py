"""Rotation of logs that another program keeps open: the file is copied and then emptied, not renamed."""

import shutil
from collections.abc import Iterable
from pathlib import Path

_BLOCK_BYTES = 512  # of st_blocks (stat(2)), whatever the file system


def rotate(logs: Iterable[Path], max_bytes: int, keep: int) -> None:
    """Where a log takes more than `max_bytes` of disk, copy it to `.1`, and older ones on to at most `.keep`.

    What is written between copy and emptying is lost. The blocks count, not the length: a program that does not append
    goes on at its old position, behind a hole. On a full disk the log is emptied without a copy.
    """
    for log in logs:
        try:
            if log.stat().st_blocks * _BLOCK_BYTES > max_bytes:
                _rotate(log, keep)
        except OSError:  # not there yet, or not ours to write: that is no reason to end
            continue


def _rotate(log: Path, keep: int) -> None:
    for number in range(keep - 1, 0, -1):
        older = _numbered(log, number)
        if older.exists():
            older.replace(_numbered(log, number + 1))
    if keep:
        try:
            shutil.copyfile(log, _numbered(log, 1))
        except OSError:
            _numbered(log, 1).unlink(missing_ok=True)
    with log.open("r+b") as file:
        file.truncate(0)


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")
