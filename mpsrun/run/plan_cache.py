"""Plans that were found to be the fastest, with what was measured, kept on disk from run to run.

Nothing here may end a training run: what cannot be read or written costs one warning a process, and a tuning.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from mpsrun import log
from mpsrun.errors import UsageError
from mpsrun.plan.plan import Plan

FORMAT = 1
MAX_ENTRIES = 512
MAX_ENTRY_BYTES = 1 << 20
# Files that a killed process left half written; a live one needs milliseconds.
STALE_S = 3600.0

_warned = False


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """Everything on which the fastest plan depends.

    graph: the graph's fingerprint. shapes: shapes and dtypes of its inputs, as text. mps: the mode of CUDA MPS. asked:
    what is tried only where it is asked for.
    """

    graph: str
    shapes: str
    device: str
    driver: str
    torch: str
    mpsrun: str
    workers: int
    mps: str
    asked: tuple[str, ...] = ()

    def digest(self) -> str:
        """Hex digits that name the key's file."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A chosen plan and what was measured.

    plan: a plan's own text. medians_us: by candidate, the median step. branch_us: by region index, the time alone of
    each branch, forward and backward. captures: not where the graph was seen to be impossible to capture.
    """

    candidate: str
    plan: str
    medians_us: dict[str, float] = {}
    branch_us: dict[int, tuple[float, ...]] = {}
    captures: bool = True


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    key: Key
    entry: Entry


class PlanCache:
    """One file for each key in `directory`, which is made when it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, key: Key) -> Entry | None:
        """The entry of `key`, whose plan is known to parse; None where there is none that can be used."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_ENTRY_BYTES)
            found = msgspec.json.decode(data, type=_File)
            Plan.parse(found.entry.plan)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, msgspec.DecodeError, UsageError, RecursionError) as error:
            _warn(f"expected a plan in {path}, found none that can be read ({error}); mpsrun tunes anew")
            return None
        if found.format != FORMAT or found.key != key:
            _warn(f"expected a plan of this network and version in {path}, found another's; mpsrun tunes anew")
            return None
        return found.entry

    def store(self, key: Key, entry: Entry) -> None:
        """Write an entry in one piece: who reads at the same time sees the old one or the new one."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(key), msgspec.json.encode(_File(FORMAT, key, entry)))
            self._prune()
        except OSError as error:
            _warn(f"could not keep a plan in {self._directory} ({error}); the next run tunes anew")

    def _path(self, key: Key) -> Path:
        return self._directory / f"{key.digest()}.json"

    def _prune(self) -> None:
        """Remove the oldest entries beyond `MAX_ENTRIES`, and what was left half written."""
        ages = sorted(_ages(self._directory.glob("*.json")), reverse=True)
        stale = [path for when, path in _ages(self._directory.glob("*.tmp")) if time.time() - when > STALE_S]
        for path in [path for _, path in ages[MAX_ENTRIES:]] + stale:
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _ages(paths: Iterator[Path]) -> Iterator[tuple[float, Path]]:
    for path in paths:
        with suppress(FileNotFoundError):  # another run has pruned it
            yield path.stat().st_mtime, path


def _warn(text: str) -> None:
    global _warned
    if not _warned:
        log.say(text)
    _warned = True
