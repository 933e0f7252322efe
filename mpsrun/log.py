"""One-line notices on stderr; the root logger belongs to the user's script and is left alone."""

import sys
from pathlib import Path

from mpsrun import config

SILENT = "(nothing)"  # the last line of an empty log


def say(text: str) -> None:
    """Write one line, `mpsrun: text`, to stderr."""
    stream = sys.__stderr__
    if stream is None:  # started with stderr closed, as under `2>&-`
        return
    try:
        stream.write(f"mpsrun: {text}\n")
        stream.flush()
    except (OSError, ValueError):  # a reader that went away or a closed stream must never end a training run
        return


def detail(text: str) -> None:
    """Write one line to stderr, under `--verbose` only."""
    if config.current().verbose:
        say(text)


def last_line(path: Path) -> str:
    """The last line of a log that says something, or `SILENT`."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return SILENT
    return next((line.strip() for line in reversed(lines) if line.strip()), SILENT)
