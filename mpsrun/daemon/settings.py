"""The daemon's settings, a TOML file. What is not in it has the default; what mpsrun does not know is an error."""

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from mpsrun.errors import UsageError

_Uuid = Annotated[str, msgspec.Meta(pattern=r"^(GPU|MIG)-[0-9a-fA-F-]+$")]
_Size = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]*[MG]$")]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """gpus: UUIDs as `nvidia-smi -L` prints them, all GPUs where there are none.

    active_thread_percentage: the part of the SMs that a client gets at most. pinned_memory_limit: by UUID, the device
    memory that a client may allocate, as "8G". log_max_mib, log_keep: when a log is rotated, and how many
    old ones stay.
    """

    gpus: tuple[_Uuid, ...] = ()
    active_thread_percentage: Annotated[int, msgspec.Meta(ge=1, le=100)] = 100
    pinned_memory_limit: dict[_Uuid, _Size] = {}
    log_max_mib: Annotated[int, msgspec.Meta(ge=1)] = 10
    log_keep: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3

    @classmethod
    def read(cls, path: Path, must_exist: bool) -> "Settings":
        """Read a file; the defaults where there is none. Raises UsageError for anything but settings."""
        try:
            values = tomllib.loads(path.read_text())
        except FileNotFoundError:
            if must_exist:
                raise UsageError(
                    f"expected settings in {path}, found no such file; write it, or name another"
                ) from None
            return cls()
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"expected a TOML file in {path}, found: {error}; correct it") from None
        try:
            settings = msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"expected settings of the daemon in {path}, found: {error}; correct it, the README lists all of them"
            ) from None
        unlisted = sorted(set(settings.pinned_memory_limit) - set(settings.gpus))
        if unlisted:
            raise UsageError(
                f"expected pinned_memory_limit for GPUs that {path} lists in gpus, found {unlisted[0]}; add it there"
            )
        return settings

    def memory_limits(self) -> dict[int, str]:
        """Return the limits by device number, which is the place of a GPU in `gpus`."""
        return {self.gpus.index(uuid): limit for uuid, limit in self.pinned_memory_limit.items()}
