"""One line of the doctor's table."""

from typing import Literal

import msgspec

Status = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """What was looked at, how it is, what was found, and what to do; `fix` is empty where all is well."""

    name: str
    status: Status
    found: str
    fix: str = ""
