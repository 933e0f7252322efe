"""One-line notices on stderr; the root logger belongs to the user's script and is left alone."""

import sys

from mpsrun import config


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
