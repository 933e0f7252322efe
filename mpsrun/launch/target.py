"""What the user asked to run: a script, a directory or archive with a `__main__.py`, or a module."""

import importlib.util
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpsrun.errors import UsageError


@dataclass(frozen=True)
class Target:
    """A script and its arguments, as they stand on the command line."""

    kind: Literal["script", "module"]
    name: str
    args: tuple[str, ...] = ()

    def to_argv(self) -> list[str]:
        """Return the words after the interpreter's flags: `[-m] name args...`."""
        return [*(["-m"] if self.kind == "module" else []), self.name, *self.args]

    @classmethod
    def from_argv(cls, words: Sequence[str]) -> "Target":
        """Read what `to_argv` wrote."""
        if words[0] == "-m":
            return cls("module", words[1], tuple(words[2:]))
        return cls("script", words[0], tuple(words[1:]))

    def is_container(self) -> bool:
        """Return whether the script is a directory or archive, of which Python runs the `__main__.py`."""
        return self.kind == "script" and (Path(self.name).is_dir() or zipfile.is_zipfile(self.name))

    def check(self) -> None:
        """Raise UsageError where there is nothing to run."""
        if self.kind == "module":
            _check_module(self.name)
        else:
            _check_script(Path(self.name))


def _check_script(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"expected a Python script, found no file {str(path)!r}; check its name and directory")
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise UsageError(
            f"expected a Python script, found the directory {str(path)!r} without a __main__.py; "
            "name a file in it, or use -m for a package"
        )
    if not os.access(path, os.R_OK):
        raise UsageError(f"expected a readable script, found no permission to read {str(path)!r}; see chmod +r")


def _check_module(name: str) -> None:
    """Look for the first part of the name only: finding more would run the package's code in the launcher."""
    top = name.partition(".")[0]
    here = [] if sys.flags.safe_path else [str(Path.cwd())]
    known = sys.path
    sys.path = [*here, *known]
    try:
        found = top.isidentifier() and importlib.util.find_spec(top) is not None
    except ValueError:  # a module already imported without a spec
        found = True
    finally:
        sys.path = known
    if not found:
        raise UsageError(
            f"expected a module after -m, found no module named {name!r}; "
            "check its name, or run from the directory that has it"
        )
