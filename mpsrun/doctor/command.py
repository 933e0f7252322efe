"""`mpsrun doctor [--json]`: the table of checks."""

from collections.abc import Sequence

import msgspec

from mpsrun.doctor.check import Check
from mpsrun.doctor.checks import run_all
from mpsrun.errors import UsageError

HELP = """\
usage: mpsrun doctor [--json]

Checks what mpsrun needs on this machine. Exit status 1 where a check fails, else 0.
"""


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    checks: list[Check]


def main(words: Sequence[str]) -> int:
    """Print the checks; returns 1 where one fails, else 0. Raises UsageError for wrong use."""
    if {"--help", "-h"} & set(words):
        print(HELP, end="")
        return 0
    if wrong := [word for word in words if word != "--json"]:
        raise UsageError(f"expected mpsrun doctor [--json], found {wrong[0]!r}; a script of this name is ./doctor")
    checks = run_all()
    if words:
        print(msgspec.json.encode(Report(checks)).decode())
    else:
        _print(checks)
    return int(any(check.status == "fail" for check in checks))


def _print(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "", "found", "fix", box=None, pad_edge=False)
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, *(text.replace("[", r"\[") for text in (check.found, check.fix)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
