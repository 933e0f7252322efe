"""The figures on disk: rows, parts, and the runs that they come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.judge import judge
from mpsrun import config

ROOT = Path(__file__).parents[1]
FIGURES = (
    "ms: median, minimum, maximum of the repeats; deviation: relative to eager; memory: at most, beyond what other "
    "engines hold; bound: see docs/benchmarks.md; run: index of runs"
)


@dataclass
class Results:
    """All figures of one file.

    runs: machine, versions and commit, once for each. rows: one for a network and batch. parts: what a step is made of.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path | None) -> Results:
        """What the file holds; nothing where there is no file."""
        if path is None or not path.exists():
            return cls()
        document = json.loads(path.read_text())
        return cls(document["runs"], document["rows"], document["parts"])

    def write(self, path: Path) -> None:
        """Replace the file, so that a run which is stopped leaves the old or the new one."""
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({"figures": FIGURES} | asdict(self), indent=1) + "\n")
        beside.replace(path)

    def has(self, network: str, batch: int) -> bool:
        """Whether this row was measured."""
        return "engines" in self._row(network, batch)

    def lacks_bound(self, network: str, batch: int) -> bool:
        """Whether this row was measured, and its bound was not."""
        return self.has(network, batch) and "ms" not in self._row(network, batch).get("bound", {})

    def put_bound(self, network: str, batch: int, bound: dict[str, Any]) -> dict[str, Any]:
        """Add the bound to a row, which keeps its run; returns the row."""
        row = self._row(network, batch)
        row["bound"] = bound
        row |= judge(row)
        return row

    def _row(self, network: str, batch: int) -> dict[str, Any]:
        return next((row for row in self.rows if (row["network"], row["batch"]) == (network, batch)), {})

    def merge(self, other: Results) -> None:
        """Take over what another file holds, each row with its run; a row without figures replaces none that has some.

        Rows are taken as a whole, since the engines of a row were measured beside each other. But a row without a bound
        keeps the one that was found before on a GPU of the same kind: it does not depend on mpsrun.
        """
        for row in other.rows:
            if "engines" in row or not self.has(row["network"], row["batch"]):
                run = other.runs[row["run"]]
                self.put_row(self._bound_before(row, run) | row, run)
        for part in other.parts:
            self.put_part(part, other.runs[part["run"]])
        used = sorted({entry["run"] for entry in (*self.rows, *self.parts)})
        self.runs = [self.runs[index] for index in used]
        for entry in (*self.rows, *self.parts):
            entry["run"] = used.index(entry["run"])

    def _bound_before(self, row: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        former = self._row(row["network"], row["batch"])
        alike = bool(former) and self.runs[former["run"]].get("gpu") == run.get("gpu")
        return {"bound": former["bound"]} if alike and "bound" in former else {}

    def put_row(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        """Add a row, or replace the one of the same network and batch."""
        judged = row | judge(row) if "engines" in row else row
        _put(self.rows, judged | {"run": self._number(run)}, ("network", "batch"))

    def put_part(self, part: dict[str, Any], run: dict[str, Any]) -> None:
        """Add a part, or replace the one of the same name."""
        _put(self.parts, part | {"run": self._number(run)}, ("part",))

    def _number(self, run: dict[str, Any]) -> int:
        if run not in self.runs:
            self.runs.append(run)
        return self.runs.index(run)


def _put(rows: list[dict[str, Any]], new: dict[str, Any], key: tuple[str, ...]) -> None:
    for i, row in enumerate(rows):
        if all(row[name] == new[name] for name in key):
            rows[i] = new
            return
    rows.append(new)


def this_run() -> dict[str, Any]:
    """Machine, versions and commit."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpu cores": config.available_cores()}
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        found |= {"gpu": torch.cuda.get_device_name(), "driver": pynvml.nvmlSystemGetDriverVersion()}
    found["python"] = platform.python_version()
    for package in ("torch", "torchvision", "timm", "mpsrun"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a checkout on PYTHONPATH, or a package that is not there
    return found | {
        "workers": config.current().worker_count(),
        "adapt": config.current().adapt,
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the checkout; MPSRUN_COMMIT where the files travelled without their history."""
    if told := os.environ.get("MPSRUN_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    return done.stdout.strip() or "unknown"
