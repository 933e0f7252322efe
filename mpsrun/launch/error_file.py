"""What ended a process, left in a file for the launcher's report.

The form is that of torch.distributed.elastic's error files, so that its tools can read them: an object `message` with
`message` and `extraInfo`. `monotonic_s` is ours: it orders failures of several processes, whatever the clock does.
"""

import os
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

LIMIT_BYTES = 1 << 20


class ExtraInfo(msgspec.Struct):
    """The traceback, the time in seconds since 1970, and the same on the clock that nobody sets."""

    py_callstack: str = ""
    timestamp: int | str = 0
    monotonic_s: float | None = None


class Error(msgspec.Struct):
    """What an exception said."""

    message: str = ""
    extraInfo: ExtraInfo = msgspec.field(default_factory=ExtraInfo)  # noqa: N815 - torchelastic's name


class ErrorFile(msgspec.Struct):
    """The whole file; `message` is a text where somebody else wrote it."""

    message: Error | str


def leave_error(path: Path, error: BaseException) -> None:
    """Leave the exception in a new file that only we can read; the first one stays."""
    text = "".join(traceback.format_exception(error))
    extra = ExtraInfo(text, int(time.time()), time.monotonic())
    data = msgspec.json.encode(ErrorFile(Error(f"{type(error).__name__}: {error}", extra)))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError:  # a full disk, or no run directory any more: the report does without
        return


def read(path: Path) -> Error | None:
    """Return what is in the file; None where there is none, or none that can be read."""
    try:
        with path.open("rb") as file:
            data: Any = msgspec.json.decode(file.read(LIMIT_BYTES), type=ErrorFile)
    except (OSError, msgspec.MsgspecError):
        return None
    return Error(data.message) if isinstance(data.message, str) else data.message
