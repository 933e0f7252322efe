"""What a script can see and do is the same under `python` and under `mpsrun`."""

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import Runner

Same = Callable[..., "subprocess.CompletedProcess[bytes]"]

WORLD = """
import os, sys
main = sys.modules["__main__"]
print(sys.argv, sys.path, sys.orig_argv, sys.flags, sys.warnoptions)
print(__name__, __file__, __spec__, __package__, __cached__, __doc__, __builtins__, type(__loader__).__name__)
print(sorted(vars(main)), vars(main) is globals(), os.getcwd(), sorted(os.environ.items()))
print([os.isatty(n) for n in (0, 1, 2)], sys.stdout.encoding, sys.stdout.line_buffering, sys.excepthook)
"""


@pytest.mark.parametrize("name", ["train.py", "./train.py", "sub/../train.py", "sub/train.py"])
def test_the_world_of_a_script(runner: Runner, same: Same, name: str) -> None:
    runner.script("", "sub/other.py")
    runner.script(WORLD, name)
    done = same(name, "--workers", "0", "-m", "x y")
    assert b"'--workers', '0', '-m', 'x y'" in done.stdout


def test_a_link_to_a_script(runner: Runner, same: Same) -> None:
    runner.script(WORLD + "\nimport beside", "real/train.py")
    runner.script("print('beside')", "real/beside.py")
    (runner.cwd / "link.py").symlink_to("real/train.py")
    assert b"beside" in same("link.py").stdout


@pytest.mark.parametrize(
    "flags", [("-u",), ("-O",), ("-W", "error", "-X", "dev"), ("-uB",), ("-P",), ("-Wignore", "-bb")], ids=str
)
def test_python_flags_are_handed_on(runner: Runner, same: Same, flags: tuple[str, ...]) -> None:
    runner.script(WORLD + "\nimport warnings; warnings.warn('careful'); assert False")
    same("train.py", flags=flags)


ENDINGS = {
    "raises": "def f(): raise ValueError('no')\nf()",
    "raises-from": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('x') from e",
    "raises-while-handling": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise RuntimeError('x')",
    "group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "syntax": "x = (\n",
    "exit-3": "import sys; sys.exit(3)",
    "exit-text": "import sys; sys.exit('done badly')",
    "exit-none": "import sys; sys.exit()",
    "exit-now": "import os; print('lost'); os._exit(7)",
    "interrupted": "raise KeyboardInterrupt",
    "interrupted-in-a-call": "def f(): raise KeyboardInterrupt('now')\nf()",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "hook": "import sys\n"
    "sys.excepthook = lambda *a: print(a[0], a[1].__traceback__ is a[2], a[2].tb_next)\nraise ValueError",
    "hook-sees-itself": "import sys\ndef h(*a): print(sys.excepthook is h)\nsys.excepthook = h\nraise ValueError",
    "at-exit": "import atexit, sys\natexit.register(lambda: print(sys.excepthook, sys.last_value))\nraise ValueError",
    "thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(.1), print('thread'))).start()\nraise ValueError",
    "thread-raises": "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()",
    "warning": "import warnings\ndef f(): warnings.warn('careful', stacklevel=2)\nf()",
}


@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS)
def test_every_ending(runner: Runner, same: Same, text: str) -> None:
    runner.script("import atexit\natexit.register(print, 'at exit')\n" + text)
    same("train.py")


def test_stdin_reaches_the_script(runner: Runner, same: Same) -> None:
    runner.script("import sys\nprint(input(), sys.stdin.read())")
    assert same("train.py", input=b"one\ntwo\nthree").stdout == b"one two\nthree\n"


def test_closed_standard_streams(runner: Runner) -> None:
    name = runner.script("import sys, os\nopen('seen', 'w').write(repr((sys.stdin, sys.stdout, sys.stderr)))")
    launcher = runner.start("--lanes", "serial", name, preexec_fn=_close_standard_streams)
    assert launcher.wait(20) == 0
    assert (runner.cwd / "seen").read_text() == "(None, None, None)"
    launcher.communicate()


def _close_standard_streams() -> None:
    import os

    os.closerange(0, 3)


def test_descriptors_of_the_shell_are_handed_on(runner: Runner) -> None:
    runner.script("import sys; print(open(sys.argv[1]).read())")
    inner = "exec python -m mpsrun --lanes serial train.py <(echo from a pipe)"
    done = subprocess.run(
        ["bash", "-c", inner.replace("python", _python(), 1)],
        cwd=runner.cwd, env=runner.environ(), capture_output=True, timeout=30,
    )  # fmt: skip
    assert done.stdout == b"from a pipe\n\n"


def _python() -> str:
    import sys

    return sys.executable


def test_a_module_of_a_package(runner: Runner, same: Same) -> None:
    runner.script("print('package')", "pkg/__init__.py")
    runner.script("from . import __name__ as n; print(n)\n" + WORLD.replace("__spec__", "__spec__.name"), "pkg/mod.py")
    runner.script("raise ValueError('in a package')", "pkg/__main__.py")
    same("-m", "pkg.mod", "-m", "--x")
    same("-m", "pkg")
    same("-m", "pkg.nosuch")


def test_a_directory_and_an_archive(runner: Runner, same: Same) -> None:
    runner.script("import beside\n" + WORLD.replace("__spec__", "__spec__.name"), "app/__main__.py")
    runner.script("print('beside')", "app/beside.py")
    same("app", "arg")
    with zipfile.ZipFile(runner.cwd / "app.pyz", "w") as archive:
        for name in ("__main__.py", "beside.py"):
            archive.write(runner.cwd / "app" / name, name)
    same("app.pyz", "arg")


def test_classes_of_main_are_pickled_and_sources_found(runner: Runner, same: Same) -> None:
    runner.script(
        "import inspect, pickle\n"
        "class Net:\n    x = 1\n"
        "def f():\n    return 'source'\n"
        "print(pickle.dumps(Net()), type(pickle.loads(pickle.dumps(Net()))) is Net, inspect.getsource(f))\n"
        "print(inspect.getsource(Net), inspect.getfile(f), inspect.getmodule(f))"
    )
    same("train.py")


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_processes_find_main(runner: Runner, same: Same, method: str, as_module: bool) -> None:
    runner.script(
        "import multiprocessing, os\n"
        "class Item:\n    def __init__(self, n): self.n = n\n"
        "def double(item): return Item(2 * item.n), __name__, __file__\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context('{method}').Pool(2) as pool:\n"
        "        for item, *rest in pool.map(double, [Item(1), Item(2)]): print(item.n, rest)\n"
        "    print([name for name in os.environ if name.startswith('MPSRUN')])\n"
    )
    done = same("-m", "train") if as_module else same("train.py")
    assert b"\n[]" in done.stdout


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_dataloader_workers(runner: Runner, method: str) -> None:
    runner.script(
        "import torch\n"
        "class Squares(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, n): return n * n\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(\n"
        f"        Squares(), batch_size=2, num_workers=1, multiprocessing_context='{method}')\n"
        "    print([batch.tolist() for batch in loader])\n"
    )
    # A daemon thread of the loader may be cut off at exit between unlinking a semaphore and saying so, in any Python.
    runner.env["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    done = runner.mpsrun("--workers", "1", "train.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[[0, 1], [4, 9]]\n", b"")


def test_files_beside_do_not_hide_what_mpsrun_imports(runner: Runner) -> None:
    for name in ("msgspec", "psutil", "config", "errors", "log", "signal", "typing", "ctypes", "dataclasses"):
        runner.script("raise SystemExit('imported a file of the user')", f"{name}.py")
    runner.script("print('fine')", "sub/train.py")
    done = runner.serial("sub/train.py")
    assert done.stdout == b"fine\n", done.stderr


def test_torch_is_not_imported_for_a_script_without_it(runner: Runner) -> None:
    runner.script("import sys; print('torch' in sys.modules, any('mpsrun' in str(f) for f in sys.meta_path))")
    assert runner.mpsrun("--workers", "1", "train.py").stdout == b"False True\n"


def test_a_script_in_a_home_that_cannot_be_written(runner: Runner, tmp_path: Path) -> None:
    runner.env = {"HOME": "/proc/nowhere"}
    runner.script("print('ran')")
    assert runner.serial("train.py").stdout == b"ran\n"


def test_subprocesses_of_the_script(runner: Runner, same: Same) -> None:
    runner.script(
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import sys; print(sys.argv, sys.flags)']\n"
        "print(subprocess.run(command, capture_output=True))"
    )
    same("train.py")


def test_options_of_the_launcher_end_at_the_script(runner: Runner) -> None:
    runner.script("import sys; print(sys.argv[1:])")
    done: Any = runner.serial("train.py", "--version", "--lanes", "nosuch")
    assert done.stdout == b"['--version', '--lanes', 'nosuch']\n"
