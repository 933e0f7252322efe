"""What the zoo found: a row a model, kept as JSON and shown as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SAME, CHAOTIC, DIFFERS, CRASH, TIME_OUT = "same", "chaotic", "DIFFERS", "CRASH", "TIME-OUT"
PLAIN_FAILS = "plain fails"
BAD = (DIFFERS, CRASH, TIME_OUT)


@dataclass(frozen=True)
class Row:
    """One model, plain against mpsrun.

    regions: by number of branches, how many regions the finder gave, over all graphs. lanes: the same for regions
    that ran on worker lanes (a branch in a worker takes its inner regions along). forwards, backwards: executions
    of jobs, as the workers tell. refused: reasons, with how often each. deviation: relative to the largest entry of
    a tensor. worst: the tensor that it was found in.
    """

    name: str
    family: str
    result: str
    px: int = 0
    dtype: str = ""
    parameters: int = 0
    graphs: int = 0
    regions: dict[str, int] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    deviation: float | None = None
    worst: str = ""
    detail: str = ""
    seconds: float = 0.0
    versions: str = ""


def read(path: Path) -> dict[str, Row]:
    """The rows of a file, by model; none where there is no file."""
    if not path.exists():
        return {}
    return {row["name"]: Row(**row) for row in json.loads(path.read_text())["rows"]}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file."""
    document: dict[str, Any] = {"figures": Row.__doc__, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def branches(regions: dict[str, int]) -> str:
    """Regions by number of branches, as "9 x 4, 1 x 2"."""
    return ", ".join(f"{count} x {width}" for width, count in sorted(regions.items(), key=_width)) or "-"


def _width(item: tuple[str, int]) -> int:
    return -int(item[0])


HEAD = """# Zoo

Networks that nobody here wrote, trained plainly and under mpsrun with lanes forced, compared after every step:
{comparison}

Written by `scripts/zoo`; the figures are those of `benchmarks/zoo.json`. Regions are written as "9 x 4": nine
regions of four branches. *Found* is what the finder gives; *on lanes* is what ran in workers: a branch that left the
lead takes the regions inside it along. *Jobs* are executions in workers, forward + backward, as the workers count
them. *Refused* are forks that stay in the lead. *Deviation* is the largest of all tensors and steps.

"""
COLUMNS = """
| model | px | found | on lanes | jobs | refused | deviation | s | result |
| --- | --: | --- | --- | --: | --- | --: | --: | --- |
"""


def table(rows: Sequence[Row], comparison: str, total: int) -> str:
    """The page: a summary, and a row a model by source; `total` is how many models there are."""
    text = HEAD.format(comparison=comparison) + summary(rows, total)
    for title, chosen in (
        ("torchvision", [row for row in rows if row.name.startswith("torchvision/")]),
        ("timm, one of each family", [row for row in rows if row.name.startswith("timm/")]),
    ):
        if chosen:
            text += f"\n## {title}\n{COLUMNS}" + "".join(_line(row) for row in chosen)
    return text


def summary(rows: Sequence[Row], total: int) -> str:
    """How many of all models ran so far, and how they came out."""
    results = Counter(row.result for row in rows)
    used = sum(bool(row.lanes) for row in rows)
    versions = ", ".join(sorted({row.versions for row in rows if row.versions}))
    told = ", ".join(f"{count} {result}" for result, count in results.most_common())
    return (
        f"{len(rows)} of {total} models have run so far ({versions}): {told}. {used} of them ran regions in workers.\n"
    )


def _line(row: Row) -> str:
    name = row.name.partition("/")[2]
    jobs = f"{row.forwards} + {row.backwards}" if row.lanes else "-"
    deviation = "-" if row.deviation is None else f"{row.deviation:.0e}"
    reasons = "; ".join(f"{count} x {_cell(reason)}" for reason, count in row.refused.items()) or "-"
    result = row.result + (f": {_cell(row.detail)}" if row.detail else "")
    if row.dtype == "float32":
        deviation += " (float32)"
    cells = (name, row.px or "-", branches(row.regions), branches(row.lanes), jobs, reasons, deviation)
    return "| " + " | ".join(map(str, cells)) + f" | {row.seconds:.0f} | {result} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
