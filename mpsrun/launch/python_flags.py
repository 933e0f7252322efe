"""The interpreter flags of this process, to hand on to the interpreter that runs the user's script."""

import sys
from collections.abc import Sequence

_WITH_VALUE_LETTERS = "WX"
_WITH_VALUE = "--check-hash-based-pycs"
_TARGET_LETTERS = "mc"


def python_flags(orig_argv: Sequence[str] | None = None) -> list[str]:
    """Return the flags before the script or `-m` in `sys.orig_argv`, as `-u -W error -X dev`."""
    words = list(sys.orig_argv if orig_argv is None else orig_argv)[1:]
    flags: list[str] = []
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word.startswith("--"):
            flags.append(word)
            if word == _WITH_VALUE and words:
                flags.append(words.pop(0))
            continue
        letters, wants_value, ends = _split(word)
        if letters:
            flags.append(f"-{letters}")
        if ends:
            break
        if wants_value and words:
            flags.append(words.pop(0))
    return flags


def _split(word: str) -> tuple[str, bool, bool]:
    """Return the letters of `-uBm` to keep, whether a value follows, and whether the target follows."""
    for position, letter in enumerate(word[1:], start=1):
        if letter in _TARGET_LETTERS:
            return word[1:position], False, True
        if letter in _WITH_VALUE_LETTERS:
            return word[1:], position == len(word) - 1, False
    return word[1:], False, False
