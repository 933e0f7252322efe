"""Whatever becomes of launcher, keeper and lead: within five seconds nothing of the run is there any more."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mpsrun.launch.leftovers import RECORD
from mpsrun.mps.identity import Identity
from tests.launch.conftest import Runner, children

LIMIT_S = 5.0
# what a script may do to the ties that the launcher made
HABITS = {
    "plain": "",
    "no parent-death signal": "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n",
    "stuck in C with the GIL": "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
    "HANG = ctypes.PyDLL(None).sleep\n",
    "deaf": "import ctypes, signal; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())\n",
}
UP = "import os, time\nHANG = time.sleep\n{habit}print('up', os.getpid(), flush=True)\nHANG(60)\n"


def wait_for(done: Callable[[], bool], since_s: float) -> None:
    while not done():
        assert time.monotonic() - since_s < LIMIT_S
        time.sleep(0.02)


def wait_ended(processes: list[psutil.Process], since_s: float) -> None:
    """All of them are gone but for a zombie that nobody has waited for yet."""
    wait_for(lambda: not any(lives(process) for process in processes), since_s)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Run:
    """A run that is up, and all of its processes."""

    def __init__(self, runner: Runner, habit: str = "plain", workers: int = 2) -> None:
        runner.script(UP.format(habit=HABITS[habit]))
        self.launcher = runner.start("--workers", str(workers), "train.py")
        assert self.launcher.stdout is not None
        self.lead = int(self.launcher.stdout.readline().split()[1])
        self.family = children(self.launcher.pid)
        (self.run_dir,) = runner.run_dirs()

    def role(self, name: str) -> psutil.Process:
        """The process whose command line has this word after `mpsrun`."""
        (found,) = [p for p in self.family if name in p.cmdline()]
        return found

    def assert_gone(self, since_s: float) -> None:
        wait_ended(self.family, since_s)
        wait_for(lambda: not self.run_dir.exists(), since_s)
        self.launcher.communicate(timeout=5)


@pytest.mark.parametrize("habit", HABITS)
def test_a_killed_launcher(runner: Runner, habit: str) -> None:
    run = Run(runner, habit)
    start = time.monotonic()
    run.launcher.kill()
    run.assert_gone(start)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_launcher_that_crashes(runner: Runner, number: signal.Signals) -> None:
    run = Run(runner, "no parent-death signal")
    start = time.monotonic()
    run.launcher.send_signal(number)
    run.assert_gone(start)


def test_a_lead_that_dies_under_a_stopped_launcher(runner: Runner) -> None:
    """The workers end without it; continued, it ends as the lead did."""
    run = Run(runner)
    workers = [process for process in run.family if "worker" in process.cmdline()]
    run.launcher.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    os.kill(run.lead, signal.SIGKILL)
    assert len(workers) == 2
    wait_ended(workers, start)
    run.launcher.send_signal(signal.SIGCONT)
    run.launcher.communicate(timeout=10)
    assert run.launcher.returncode == -signal.SIGKILL
    assert not run.run_dir.exists()


def test_a_killed_keeper_does_not_matter(runner: Runner) -> None:
    run = Run(runner)
    run.role("keeper").kill()
    run.launcher.terminate()
    start = time.monotonic()
    run.assert_gone(start)
    assert run.launcher.returncode == -signal.SIGTERM


def test_a_killed_keeper_is_replaced(runner: Runner) -> None:
    """The next one knows the lead, and does what the first one would have done."""
    run = Run(runner, "no parent-death signal")
    first = run.role("keeper")
    first.kill()
    start = time.monotonic()
    wait_for(lambda: [p for p in children(run.launcher.pid) if "keeper" in p.cmdline() and p != first] != [], start)
    run.family = children(run.launcher.pid)
    run.launcher.kill()
    run.assert_gone(time.monotonic())


def test_launcher_and_keeper_killed_at_once(runner: Runner) -> None:
    """What is tied to the launcher dies with it; what is not, and the directory, with the next start."""
    run = Run(runner, "no parent-death signal")
    run.launcher.send_signal(signal.SIGSTOP)  # else it might have started another keeper by then
    run.role("keeper").kill()
    run.launcher.kill()
    lead = psutil.Process(run.lead)
    others = [process for process in run.family if process.pid != run.lead]
    wait_ended(others, time.monotonic())
    assert lives(lead)
    assert run.run_dir.exists()
    runner.script("")
    assert runner.mpsrun("--lanes", "serial", "train.py").returncode == 0
    assert not lives(lead)
    assert not run.run_dir.exists()
    run.launcher.communicate(timeout=5)


def test_the_next_start_leaves_other_processes_alone(runner: Runner) -> None:
    """A stale record names a pid that somebody else has by now: pid, start and boot must all be the same."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        me = Identity.of(bystander.pid)
        assert me is not None
        stale = runner.runtime / "mpsrun" / "stale"
        stale.mkdir(parents=True)
        (runner.runtime / "mpsrun").chmod(0o700)
        lines = [Identity(me.pid, me.started - 1, me.boot), Identity(me.pid, me.started, "another-boot")]
        (stale / RECORD).write_text("\n".join(map(str, lines)) + "\n12 3\nnoise\n99999999999 1 x\n")
        run = Run(runner)
        assert not stale.exists()
        assert bystander.poll() is None
        assert all(process.is_running() for process in run.family)
        second = runner.mpsrun("--lanes", "serial", "-m", "this")
        assert second.returncode == 0, "a run beside it"
        assert run.run_dir.exists()
        assert all(process.is_running() for process in run.family)
        run.launcher.terminate()
        run.launcher.communicate(timeout=10)
        bystander.kill()


def test_children_of_the_script_keep_nothing_alive(runner: Runner) -> None:
    """A forked child, as a DataLoader's worker is one, has no end of the keeper's pipe; it is the script's own."""
    runner.script(
        "import os, time\nchild = os.fork()\n"
        "if not child:\n    time.sleep(60)\nprint('up', os.getpid(), child, flush=True)\ntime.sleep(60)"
    )
    launcher = runner.start("--workers", "1", "train.py")
    assert launcher.stdout is not None
    lead, child = (int(word) for word in launcher.stdout.readline().split()[1:])
    family = [process for process in children(launcher.pid) if process.pid != child]
    start = time.monotonic()
    launcher.kill()
    wait_ended(family, start)
    wait_for(lambda: not runner.run_dirs(), start)
    os.kill(child, signal.SIGKILL)
    launcher.communicate(timeout=5)
    assert lead in [process.pid for process in family]


@pytest.mark.parametrize("also", ["", "guard"])
def test_a_private_cuda_mps_ends_with_its_launcher(runner: Runner, cuda_mps: Path, also: str) -> None:
    """Daemon and server go in good order; where the guard was killed before, they are found by their directory."""
    runner.script(
        "import os, subprocess, time\n"
        "subprocess.run(['nvidia-cuda-mps-control'], input=b'start_server -uid 0\\n')\n"
        "print('up', os.getpid(), flush=True)\ntime.sleep(60)"
    )
    launcher = runner.start("--workers", "1", "train.py")
    assert launcher.stdout is not None
    launcher.stdout.readline()
    family = children(launcher.pid)
    words = [" ".join(process.cmdline()) for process in family]
    assert sum("nvidia-cuda-mps" in line for line in words) == 2
    start = time.monotonic()
    if also:
        next(p for p, line in zip(family, words, strict=True) if "mps-daemon" in line).kill()
    launcher.kill()
    wait_ended(family, start)
    wait_for(lambda: not runner.run_dirs(), start)
    launcher.communicate(timeout=5)


def test_shared_memory_of_a_dead_lead_is_removed(runner: Runner) -> None:
    """What torch names after the lead, and nothing else."""
    run = Run(runner)
    mine, other = (Path(f"/dev/shm/torch_{pid}_1_0") for pid in (run.lead, os.getpid()))
    for path in (mine, other):
        path.write_bytes(b"x")
    try:
        start = time.monotonic()
        run.launcher.kill()
        run.assert_gone(start)
        assert not mine.exists()
        assert other.exists()
    finally:
        other.unlink()


def test_other_users_are_kept_out(runner: Runner) -> None:
    """Neither sockets nor the secret can be reached, and neither command lines nor logs nor environments tell it."""
    run = Run(runner)
    secret = (run.run_dir / "secret").read_bytes()
    assert stat.S_IMODE((run.run_dir / "secret").stat().st_mode) == 0o600
    for process in [psutil.Process(run.launcher.pid), *run.family]:
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert secret not in shown
            assert secret.hex().encode() not in shown
    assert all(secret not in path.read_bytes() for path in run.run_dir.glob("*.log"))
    if os.getuid() == 0:
        program = (
            "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
            "for name in ('secret', 'worker-1'):\n"
            "    try:\n        open(os.path.join(sys.argv[1], name), 'rb')\n        print('opened', name)\n"
            "    except PermissionError:\n        pass\n"
            "try:\n    socket.socket(socket.AF_UNIX).connect(os.path.join(sys.argv[1], 'worker-1'))\n"
            "    print('connected')\nexcept PermissionError:\n    pass\n"
            f"try:\n    print(os.listdir('/proc/{run.lead}/fd'))\nexcept PermissionError:\n    pass\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(run.run_dir)], capture_output=True, timeout=20)
        assert (done.stdout, done.stderr) == (b"", b"")
    run.launcher.terminate()
    run.launcher.communicate(timeout=10)
