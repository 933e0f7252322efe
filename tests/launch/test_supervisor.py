"""Signals to the launcher, the end of every process, and what each is called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import Runner, children

UP = "import os, signal, sys, time\nprint('up', os.getpid(), flush=True)\n"
# not one long sleep: a signal between Python's look and the system call would wait for its end
SLEEP = UP + "for _ in range(3000): time.sleep(.01)\n"


def started(runner: Runner, *args: str) -> tuple["subprocess.Popen[bytes]", int]:
    """Start the launcher; return it and the lead's pid once the script runs."""
    launcher = runner.start(*args, "train.py")
    assert launcher.stdout is not None
    return launcher, int(launcher.stdout.readline().split()[1])


def ended(launcher: "subprocess.Popen[bytes]") -> tuple[int, bytes, bytes]:
    out, err = launcher.communicate(timeout=20)
    return launcher.returncode, out, err


def wait_gone(pids: list[int], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_a_signal_to_the_launcher_is_the_scripts(runner: Runner, number: signal.Signals) -> None:
    runner.script(SLEEP)
    launcher, lead = started(runner, "--lanes", "serial")
    launcher.send_signal(number)
    assert ended(launcher)[0] == -number
    wait_gone([lead])


def test_a_script_may_handle_a_signal_which_comes_once(runner: Runner) -> None:
    runner.script(
        "import signal\nseen = []\nsignal.signal(signal.SIGUSR1, lambda *a: seen.append(a[0]))\n"
        + UP
        + "while not seen: time.sleep(.01)\ntime.sleep(.2)\nprint(seen == [signal.SIGUSR1])"
    )
    launcher, _ = started(runner, "--lanes", "serial")
    launcher.send_signal(signal.SIGUSR1)
    assert ended(launcher)[:2] == (0, b"True\n")


def test_a_signal_of_the_script_to_its_group_comes_once(runner: Runner) -> None:
    runner.script(
        "import signal\nseen = []\nsignal.signal(signal.SIGUSR1, lambda *a: seen.append(a[0]))\n"
        + UP
        + "os.kill(0, signal.SIGUSR1)\ntime.sleep(.3)\nprint(len(seen))"
    )
    launcher = runner.start("--lanes", "serial", "train.py", process_group=0)
    assert ended(launcher)[1].split()[-1] == b"1"


def test_ignored_signals_stay_ignored(runner: Runner) -> None:
    runner.script(UP + "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, signal.pthread_sigmask(0, []))")
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    launcher = runner.start("--lanes", "serial", "train.py", preexec_fn=ignore)
    assert ended(launcher)[1].endswith(b"True set()\n")


def test_a_blocked_signal_stays_blocked(runner: Runner) -> None:
    runner.script(UP + "print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR2})")
    block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # noqa: E731
    launcher = runner.start("--lanes", "serial", "train.py", preexec_fn=block)
    assert ended(launcher)[1].endswith(b"True\n")


def test_stop_and_continue(runner: Runner) -> None:
    runner.script(SLEEP)
    launcher, lead = started(runner, "--lanes", "serial")
    launcher.send_signal(signal.SIGTSTP)  # the process group has no shell, so the launcher itself cannot stop
    launcher.send_signal(signal.SIGCONT)
    os.kill(lead, signal.SIGSTOP)
    launcher.send_signal(signal.SIGCONT)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == -signal.SIGTERM


def test_ps_shows_what_is_what(runner: Runner) -> None:
    runner.script(SLEEP)
    launcher, lead = started(runner, "--workers", "2")
    (run_dir,) = runner.run_dirs()
    lines = {process.pid: " ".join(process.cmdline()) for process in children(launcher.pid)}
    assert "mpsrun lead train.py" in lines[lead]
    assert sorted(line.rpartition("mpsrun ")[2].replace(str(run_dir), "") for line in lines.values()) == [
        "keeper ",
        "lead train.py",
        "worker 1",
        "worker 2",
    ]
    assert all(os.getpgid(pid) != os.getpgid(lead) for pid in lines if pid != lead)
    launcher.terminate()
    ended(launcher)
    wait_gone(list(lines))


def test_the_end_of_a_script_ends_the_workers_at_once(runner: Runner) -> None:
    runner.script("print('ran')")
    start = time.monotonic()
    done = runner.mpsrun("--workers", "2", "train.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ran\n", b"")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("role", ["launcher", "lead"])
def test_a_killed_process_takes_the_others_along(runner: Runner, role: str) -> None:
    runner.script(SLEEP)
    launcher, lead = started(runner, "--workers", "2")
    pids = [process.pid for process in children(launcher.pid)]
    assert len(pids) == 4
    os.kill(launcher.pid if role == "launcher" else lead, signal.SIGKILL)
    assert ended(launcher)[0] == -signal.SIGKILL
    wait_gone(pids)


def test_the_death_of_a_worker_is_told_and_the_script_goes_on(runner: Runner) -> None:
    runner.script(UP + "sys.stdin.readline()\nprint('through')")
    launcher, _ = started(runner, "--workers", "1")
    worker = next(process for process in children(launcher.pid) if process.cmdline()[-2:] == ["worker", "1"])
    worker.kill()
    time.sleep(0.3)
    code, out, err = ended(launcher)
    assert (code, out) == (0, b"through\n")
    assert err.startswith(f"mpsrun: worker 1 (pid {worker.pid}) was killed by SIGKILL; last line of ".encode())
    assert err.count(b"\n") == 1


def test_logs_of_workers_are_kept(runner: Runner, tmp_path: Path) -> None:
    runner.script("")
    assert runner.mpsrun("--workers", "2", "--log-dir", "logs/here", "train.py").returncode == 0
    assert sorted(path.name for path in (tmp_path / "logs/here").iterdir()) == [
        "worker-1.log",
        "worker-2.log",
    ]


def test_a_segfault_is_the_launchers_too(runner: Runner) -> None:
    runner.script("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert runner.serial("train.py").returncode == -signal.SIGSEGV


def test_a_worker_ends_with_a_parent_that_is_no_launcher(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom mpsrun.config import Config\n"
        "from mpsrun.launch.spawn import spawn_worker\n"
        "print(spawn_worker(Config(run_dir=Path(sys.argv[1])), 1, os.getpid()).pid, flush=True)\n"
        "time.sleep(.5)\nos._exit(0)"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=30)
    wait_gone([int(done.stdout)])
