"""Keys, pdb and isatty at a terminal, with the job control of a shell, under `python` and `mpsrun` alike."""

import signal
import sys

import pytest

from tests.launch.conftest import Runner
from tests.launch.terminal import Terminal

COMMANDS = {
    "python": (),
    "serial": ("-m", "mpsrun", "--lanes", "serial"),
    "workers": ("-m", "mpsrun", "--workers", "1"),
}
# not one long sleep: a signal between Python's look and the system call would wait for its end
SLEEP = "print('up', flush=True); [time.sleep(.01) for _ in range(3000)]\n"


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> list[str]:
    return [sys.executable, *COMMANDS[request.param], "train.py"]


def open_terminal(runner: Runner, command: list[str], text: str) -> Terminal:
    runner.script(text)
    return Terminal(command, runner.cwd, runner.environ())


def test_ctrl_c_ends_by_sigint(runner: Runner, command: list[str]) -> None:
    text = "import time, atexit\natexit.register(print, 'saved')\n" + SLEEP
    with open_terminal(runner, command, text) as terminal:
        terminal.expect(b"up")
        terminal.type(b"\x03")
        terminal.expect(b"KeyboardInterrupt")
        terminal.expect(b"saved")
        assert terminal.job() == f"ended {-signal.SIGINT}"


def test_ctrl_c_may_be_caught_and_comes_once(runner: Runner, command: list[str]) -> None:
    text = (
        "import time\ncount = 0\n"
        "try:\n    " + SLEEP + "except KeyboardInterrupt:\n    count += 1\n"
        "try:\n    time.sleep(0.5)\nexcept KeyboardInterrupt:\n    count += 1\n"
        "print('interrupts', count)\nraise SystemExit(5)"
    )
    with open_terminal(runner, command, text) as terminal:
        terminal.expect(b"up")
        terminal.type(b"\x03")
        terminal.expect(b"interrupts 1")
        assert terminal.job() == "ended 5"


def test_ctrl_z_and_fg(runner: Runner, command: list[str]) -> None:
    text = "import time\nprint('up', flush=True)\nfor n in range(200): time.sleep(.01)\nprint('through')"
    with open_terminal(runner, command, text) as terminal:
        terminal.expect(b"up")
        terminal.type(b"\x1a")
        assert terminal.job() == f"stopped {signal.SIGTSTP}"
        terminal.type(b"fg\n")
        terminal.expect(b"through")
        assert terminal.job() == "ended 0"


def test_pdb_isatty_and_input(runner: Runner, command: list[str]) -> None:
    text = (
        "import os\nprint([os.isatty(n) for n in (0, 1, 2)])\nname = input('name? ')\n"
        "answer = 6\nbreakpoint()\nprint(name, answer)"
    )
    with open_terminal(runner, command, text) as terminal:
        terminal.expect(b"[True, True, True]")
        terminal.expect(b"name? ")
        terminal.type(b"Ada\n")
        terminal.expect(b"(Pdb) ")
        terminal.type(b"answer = answer * 7\n")
        terminal.expect(b"(Pdb) ")
        terminal.type(b"c\n")
        terminal.expect(b"Ada 42")
        assert terminal.job() == "ended 0"


def test_a_closed_terminal_ends_the_run(runner: Runner, command: list[str]) -> None:
    text = (
        "import signal, time\n"
        "def gone(*_):\n    open('gone', 'a').write('x')\n    raise SystemExit(4)\n"
        "signal.signal(signal.SIGHUP, gone)\n" + SLEEP
    )
    with open_terminal(runner, command, text) as terminal:
        terminal.expect(b"up")
    for _ in range(100):
        if (runner.cwd / "gone").exists() and not runner.run_dirs():
            break
        signal.sigtimedwait([], 0.05)
    assert (runner.cwd / "gone").read_text() == "x"
