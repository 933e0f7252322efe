"""What a model may choose for itself: the options of `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mpsrun import config
from mpsrun.errors import MpsrunError

LANES = get_args(config.Lanes)


@dataclass(frozen=True)
class Options:
    """lanes: as on the command line. workers: use at most so many; None for all."""

    lanes: str
    workers: int | None

    @property
    def forced(self) -> bool:
        """Whether every region that can leaves the lead's own stream, whether that pays or not."""
        return self.lanes not in ("auto", "serial")

    @classmethod
    def read(cls, options: Mapping[str, Any], mode: str | None) -> Options:
        """Raises `MpsrunError` where `torch.compile` was given something else."""
        unknown = set(options) - {"lanes", "workers"}
        if unknown or mode is not None:
            found = sorted(unknown) or f"mode={mode!r}"
            raise MpsrunError(f'expected no options but "lanes" and "workers", found {found}')
        lanes, workers = options.get("lanes", config.current().lanes), options.get("workers")
        if lanes not in LANES:
            raise MpsrunError(f"expected lanes to be one of {LANES}, found {lanes!r}")
        if workers is not None and (type(workers) is not int or workers < 1):
            raise MpsrunError(f"expected workers to be a whole number from 1, found {workers!r}")
        return cls(lanes, workers)
