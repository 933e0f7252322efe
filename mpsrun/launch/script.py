"""Running the user's script as `python script.py` or `python -m module` would, inside this process."""

import builtins
import importlib.machinery
import os
import runpy
import sys
from collections.abc import Callable
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from mpsrun.launch.python_flags import python_flags
from mpsrun.launch.target import Target

_replaced: list[ModuleType] = []  # our own __main__: its globals belong to frames below the script's


def run(target: Target, ready: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
    """Run the target as `__main__`; returns or raises as it does.

    `ready` is called last before it, `failed` with what it raises.
    """
    main = _new_main_module()
    sys.orig_argv = [sys.executable, *python_flags(), *target.to_argv()]
    try:
        if target.kind == "module":
            _set_path(os.getcwd())  # noqa: PTH109 - as the interpreter does it
            sys.argv = ["-m", *target.args]
            ready()
            _run_module(target.name)
        elif target.is_container():
            sys.path.insert(0, _absolute(target.name))
            sys.argv = [target.name, *target.args]
            ready()
            _run_module("__main__", alter_argv=False)
        else:
            _set_path(os.path.dirname(os.path.realpath(target.name)))  # noqa: PTH120
            sys.argv = [target.name, *target.args]
            _run_script(main, target.name, ready)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - raised again
        _raise_as_own(error, failed)


def _run_module(name: str, alter_argv: bool = True) -> None:
    """Call what `python -m` calls: it finds the code, fills `__main__` and says what is missing."""
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]  # noqa: SLF001


def _run_script(main: ModuleType, name: str, ready: Callable[[], None]) -> None:
    path = _absolute(name)
    loader: importlib.machinery.SourceFileLoader | importlib.machinery.SourcelessFileLoader
    if name.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader("__main__", path)
    else:
        loader = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
    ready()
    code: CodeType | None
    if isinstance(loader, importlib.machinery.SourceFileLoader):
        # neither get_code, which would write to __pycache__, nor frames of importlib above a SyntaxError
        code = compile(loader.get_data(path), path, "exec", dont_inherit=True)
    else:
        code = loader.get_code("__main__")
    assert code is not None, "both loaders have code or raise"
    exec(code, main.__dict__)  # noqa: S102 - this is what a launcher is for


def _absolute(name: str) -> str:
    """Make a name absolute as the interpreter does, which leaves `./` and `..` inside as they are."""
    return os.getcwd() if name == "." else os.path.join(os.getcwd(), name)  # noqa: PTH109, PTH118


def _new_main_module() -> ModuleType:
    _replaced.append(sys.modules["__main__"])
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    return main


def _set_path(first: str) -> None:
    """Put what Python puts first; our own `-m` entry is gone already. Not under `-P` or `-I`."""
    if not sys.flags.safe_path:
        sys.path.insert(0, first)


def _raise_as_own(error: BaseException, failed: Callable[[BaseException], None]) -> NoReturn:
    """Let an error end the process as Python would, with a traceback that starts in the script.

    The interpreter calls `sys.excepthook`, joins threads, runs exit handlers and chooses the exit status
    (SIGINT for KeyboardInterrupt), all in its order; only the frames of mpsrun are taken off, by a hook for
    this one call.
    """
    hook = sys.excepthook

    def excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> Any:
        sys.excepthook = hook
        trace = _without_own_frames(trace)
        sys.last_traceback = trace
        failed(value.with_traceback(trace))
        return hook(kind, value.with_traceback(trace), trace)

    sys.excepthook = excepthook
    raise error


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drop the outer frames up to and including the last one of this file."""
    inside = False
    while trace is not None:
        own = trace.tb_frame.f_code.co_filename == __file__
        if inside and not own:
            return trace
        inside = inside or own
        trace = trace.tb_next
    return trace
