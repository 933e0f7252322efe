"""A training on worker lanes whose script breaks down somewhere: started again, its losses are those of a whole run."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.conftest import Runner
from tests.launch.terminal import Terminal

SCRIPT = Path(__file__).with_name("training.py")
LANES = ("--lanes", "workers", "--workers", "1")


def losses(directory: Path) -> dict[str, str]:
    """The loss of each step; one that was done twice, before and after a restart, must have the same loss twice."""
    found: dict[str, str] = {}
    for line in (directory / "losses").read_text().splitlines():
        step, loss = line.split()
        assert found.setdefault(step, loss) == loss, f"step {step} has another loss the second time"
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("whole")
    runner = Runner(place, tmp_path_factory.mktemp("r"))
    done = runner.mpsrun(*LANES, str(SCRIPT), str(place))
    assert done.returncode == 0, done.stderr.decode()
    found = losses(place)
    assert len(found) == 17
    return found


@pytest.mark.parametrize(
    ("where", "how", "step"),
    [
        ("forward", "SIGSEGV", 5),
        *(
            pytest.param(*fault, marks=pytest.mark.slow)
            for fault in (
                ("import", "SIGKILL", -1),
                ("import", "raise", -1),
                ("forward", "exit", 0),
                ("backward", "SIGKILL", 9),
                ("backward", "raise", 8),
                ("between", "SIGABRT", 7),
                ("between", "SIGKILL", 15),
                ("exit", "SIGKILL", -1),
                ("exit", "exit", -1),
            )
        ),
    ],
)
def test_started_again(
    runner: Runner, tmp_path: Path, undisturbed: dict[str, str], where: str, how: str, step: int
) -> None:
    start = time.monotonic()
    done = runner.mpsrun(*LANES, "--max-restarts", "1", str(SCRIPT), str(tmp_path), where, how, str(step))
    text = done.stderr.decode()
    assert done.returncode == 0, text
    assert time.monotonic() - start < 40
    assert losses(tmp_path) == undisturbed
    cause = text.partition("Root Cause")[2].partition("Other Failures")[0]
    assert "  role      : lead\n" in cause
    wanted = {"raise": f"RuntimeError: broken in {where}", "exit": "exitcode  : 7 "}
    assert wanted.get(how, f"exitcode  : {-getattr(signal, how, 0)} ({how})") in cause
    assert text.count("starting it again (1 of 1)") == 1


AGAIN = """
import contextlib, os, signal, time
import psutil
def worker():
    for _ in range(2000):
        for found in psutil.Process(os.getppid()).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if found.cmdline()[-len(role):] == role:
                    return found
        time.sleep(.01)
role = ["worker", "1"]
first = worker()
first.kill()
role += ["1"]
print("replaced", worker().pid != first.pid, flush=True)
os.environ["MPSRUN_RESTART_COUNT"] == "0" and os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_workers_are_started_again_in_each_life(runner: Runner) -> None:
    """The group's failure is told with that of the worker before; the new group's workers begin anew."""
    runner.script(AGAIN)
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "train.py")
    text = done.stderr.decode()
    assert (done.returncode, done.stdout.split()) == (0, [b"replaced", b"True"] * 2), text
    assert text.count("Root Cause (first observed failure):") == 1
    assert text.count("  role      : worker 1\n") == text.count("  role      : lead\n") == 1
    assert text.count("was killed by SIGKILL; last line of") == 2


def test_a_worker_that_was_replaced_fails_no_script(runner: Runner) -> None:
    runner.script(AGAIN.replace('== "0"', '== "never"'))
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "train.py")
    assert (done.returncode, done.stdout.split()) == (0, [b"replaced", b"True"])
    assert b"Root Cause" not in done.stderr


def test_restarts_run_out(runner: Runner, tmp_path: Path) -> None:
    runner.script("import os\nprint(os.environ['TORCHELASTIC_RESTART_COUNT'], flush=True)\nos._exit(9)")
    done = runner.mpsrun("--workers", "1", "--max-restarts", "2", "train.py")
    assert (done.returncode, done.stdout.split()) == (9, [b"0", b"1", b"2"])
    assert done.stderr.count(b"Root Cause (first observed failure):") == 3


@pytest.mark.parametrize("status", [0, 2, 4])
def test_no_start_that_would_not_help(runner: Runner, status: int) -> None:
    runner.script(f"print('ran')\nraise SystemExit({status})")
    done = runner.mpsrun("--workers", "1", "--max-restarts", "2", "train.py")
    assert (done.returncode, done.stdout) == (status, b"ran\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_no_start_after_an_end_that_was_asked_for(runner: Runner, number: signal.Signals) -> None:
    runner.script("import time\nprint('up', flush=True)\nfor _ in range(3000): time.sleep(.01)")
    launcher = runner.start("--workers", "1", "--max-restarts", "2", "train.py")
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"up\n"
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=10)
    assert (launcher.returncode, out) == (-number, b"")
    assert b"starting it again" not in err


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [LANES, ("--lanes", "captured")], ids=["workers", "captured"])
def test_ctrl_c_ends_a_script_that_hangs_in_c(runner: Runner, tmp_path: Path, lanes: Sequence[str]) -> None:
    """It holds the GIL and would stay for a minute; a plain script would, too."""
    command = [sys.executable, "-m", "mpsrun", *lanes, str(SCRIPT), str(tmp_path), "between", "hang", "6"]
    with Terminal(command, runner.cwd, runner.environ()) as terminal:
        terminal.expect(b"hangs", 40)
        time.sleep(0.2)
        start = time.monotonic()
        terminal.type(b"\x03")
        terminal.expect(b"has not come back to Python within", 12)
        assert terminal.job() == "ended 3"
        assert time.monotonic() - start < 10.5


@pytest.mark.slow
def test_ctrl_c_leaves_a_script_that_goes_on(runner: Runner, tmp_path: Path) -> None:
    """It catches the interrupt and takes its time: longer than one that hangs would get."""
    runner.script(
        SCRIPT.read_text().replace("\nmain()\n", "")
        + "\nimport time\ndirectory.mkdir(exist_ok=True)\nmain()\nprint('up', flush=True)\n"
        "try:\n    while True: time.sleep(.01)\nexcept KeyboardInterrupt:\n    pass\n"
        "for _ in range(100): time.sleep(.1)\nprint('saved')"
    )
    command = [sys.executable, "-m", "mpsrun", *LANES, "train.py", str(tmp_path / "d")]
    with Terminal(command, runner.cwd, runner.environ()) as terminal:
        terminal.expect(b"up", 40)
        terminal.type(b"\x03")
        terminal.expect(b"saved", 15)
        assert terminal.job() == "ended 0"


@pytest.mark.slow
def test_a_jump_of_the_clock_changes_nothing(runner: Runner, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The script's calendar jumps back by a day in the middle; every wait counts on another clock."""
    runner.script(
        "import time\nnow = time.time\ntime.time = lambda: now() - 86400\n"
        f"exec(compile(open({str(SCRIPT)!r}).read(), 'training.py', 'exec'))"
    )
    done = runner.mpsrun(*LANES, "--max-restarts", "1", "train.py", str(tmp_path), "between", "raise", "5")
    assert done.returncode == 0, done.stderr.decode()
    assert losses(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "worker-1"])
def test_a_removed_socket(runner: Runner, tmp_path: Path, undisturbed: dict[str, str], name: str) -> None:
    """Somebody clears the run directory of a run: what is connected stays connected."""
    text = SCRIPT.read_text().replace(
        'break_down("between", step)',
        f"step == 5 and os.unlink(__import__('mpsrun.config').config.current().run_dir / {name!r})",
    )
    runner.script(text)
    done = runner.mpsrun(*LANES, "train.py", str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert losses(tmp_path) == undisturbed
    assert (b"was removed" in done.stderr) == (name == "report")


def in_a_namespace(runner: Runner, mounts: str, *args: str) -> "subprocess.CompletedProcess[bytes]":
    """Run mpsrun where these tmpfs are mounted, which nobody else sees."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount: unshare -m is refused")
    command = " && ".join([*(f"mount -t tmpfs {mount}" for mount in mounts.split(";")), 'exec "$@"'])
    words = ["unshare", "-rm", "sh", "-c", command, "sh", sys.executable, "-m", "mpsrun", *args]
    return subprocess.run(words, cwd=runner.cwd, env=runner.environ(), capture_output=True, timeout=90)


@pytest.mark.slow
def test_a_full_dev_shm(runner: Runner, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Lanes need no room there."""
    done = in_a_namespace(runner, "-o size=4k shm /dev/shm", *LANES, str(SCRIPT), str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert losses(tmp_path) == undisturbed


def test_a_full_disk(runner: Runner, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """No room for checkpoints, nor for logs and notes of the run: one line a checkpoint, and the training goes on."""
    small = tmp_path / "small"
    (small / "checkpoints").mkdir(parents=True)
    mounts = f"-o size=16k small {small}/checkpoints;-o size=16k run {runner.runtime}"
    done = in_a_namespace(runner, mounts, *LANES, str(SCRIPT), str(small))
    assert done.returncode == 0, done.stderr.decode()
    assert losses(small) == undisturbed
    assert b"expected to write a checkpoint of step 1 to" in done.stderr


def test_no_room_for_the_run_itself(runner: Runner) -> None:
    """One line that says so, and nothing has been started."""
    runner.script("print('ran')")
    done = in_a_namespace(runner, f"-o size=4k run {runner.runtime}", "--workers", "1", "train.py")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"mpsrun: expected a run directory that can be written, found ")
    assert b"No space left on device; set XDG_RUNTIME_DIR" in done.stderr
