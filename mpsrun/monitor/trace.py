"""Traces: JSON lines of what was sampled, stepped and decided, to be looked at and to be replayed.

Launcher and lead append to one file; each line is one write, so that lines stay whole.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from mpsrun.errors import UsageError
from mpsrun.monitor.sample import Sample


class Sampled(msgspec.Struct, frozen=True, tag="sample"):
    """The monitor's sample."""

    sample: Sample


class Stepped(msgspec.Struct, frozen=True, tag="step"):
    """A training step of a network (`graph`) took `us` microseconds under a plan."""

    at_s: float
    graph: str
    plan: str
    us: float


class Decided(msgspec.Struct, frozen=True, tag="decision"):
    """What was decided for a network, in words; `plan` runs from now on."""

    at_s: float
    graph: str
    plan: str
    line: str


Line = Sampled | Stepped | Decided
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class Trace:
    """A file that takes lines from several processes; one that can no longer be written is left alone."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def add(self, line: Line) -> None:
        """Append a line."""
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, msgspec.json.encode(line) + b"\n")
            except OSError:  # a full disk must not end a training run
                self.close()

    def close(self) -> None:
        """Write no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a trace; UsageError where one is none. A last line that was cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            yield _decoder.decode(line)
        except msgspec.DecodeError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise UsageError(f"expected a line of a trace in {path}:{number}, found: {error}; write it anew") from None


def samples(lines: Iterable[Line]) -> list[Sample]:
    """Return the monitor's samples among the lines."""
    return [line.sample for line in lines if isinstance(line, Sampled)]
