"""Imports run downward only, and each outside system has one package that speaks to it."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mpsrun"

OF_LAUNCH = ("rundir", "workers", "error_file", "pulse")
# What each package may import; errors, log and config are open to all.
BELOW = {
    "cli": {"launch", "mps", "report", "daemon", "doctor"},
    "doctor": {"mps", "monitor", "device", "launch.hardware"},
    "daemon": {"mps", "monitor"},
    "launch": {"run", "mps", "monitor"},
    "report": {"run", "plan", "graph"},
    "run": {
        "mps",
        "wire",
        "device",
        "plan",
        "graph",
        "monitor.page",
        "monitor.sample",
        "monitor.trace",
        *(f"launch.{name}" for name in OF_LAUNCH),
    },
    "wire": {"device", "plan", "graph"},
    "checkpointer": set[str](),
    "device": set[str](),
    "mps": {"monitor"},
    "monitor": set[str](),
    "plan": {"graph"},
    "graph": set[str](),
    "config": set[str](),
    "checkout": set[str](),
    "log": set[str](),
    "errors": set[str](),
}
OPEN_TO_ALL = {"config", "log", "errors", "checkout"}
ONLY_IN = {"zmq": "wire", "pynvml": "monitor", "cuda": "device"}
NOWHERE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
PURE = ("graph", "plan")
EFFECTS = {"subprocess", "socket", "multiprocessing", "threading", "signal", "psutil", "ctypes"}
WITHOUT_TORCH = ("cli", "launch", "daemon", "monitor", "mps", *sorted(OPEN_TO_ALL))

FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    """`launch.spawn` for mpsrun/launch/spawn.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, only_at_start: bool = False) -> Iterator[str]:
    """Every module that a file imports, by its whole name; `from a import b` may mean `a.b`, so both."""
    tree = ast.parse(path.read_text())
    for node in tree.body if only_at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path, only_at_start: bool = False) -> set[str]:
    """The modules of mpsrun that a file imports, as `launch.spawn`."""
    known = {module_name(file) for file in FILES}
    found = (name.removeprefix("mpsrun.") for name in imports(path, only_at_start) if name.startswith("mpsrun."))
    return {name for name in found if name in known}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    package = module_name(path).partition(".")[0]
    if package in ("", "__main__"):  # the package itself and `python -m mpsrun` hand on to what is below
        return
    allowed = BELOW[package] | OPEN_TO_ALL | {package}
    wrong = {name for name in own_imports(path) if name not in allowed and name.partition(".")[0] not in allowed}
    assert wrong == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_outside_system_has_one_package(path: Path) -> None:
    package = module_name(path).partition(".")[0]
    tops = {name.partition(".")[0] for name in imports(path)}
    assert {name for name in tops & set(ONLY_IN) if ONLY_IN[name] != package} == set()
    assert tops & NOWHERE == set()
    if package in PURE:
        assert tops & EFFECTS == set()
    if package in WITHOUT_TORCH:
        assert "torch" not in tops


def test_no_module_imports_itself_through_others() -> None:
    graph = {module_name(path): own_imports(path, only_at_start=True) - {module_name(path)} for path in FILES}
    # a package is above its modules, which may not import it while it imports them
    TopologicalSorter(graph).prepare()


def test_the_standard_library_has_all_effects_that_are_named() -> None:
    assert EFFECTS - {"psutil"} <= sys.stdlib_module_names
