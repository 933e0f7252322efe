"""Faults of CUDA MPS and of what its clients share, played by a scripted daemon: told, recovered from, cleared up."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import Runner

START = r"""
import os, signal, subprocess, sys, time
import psutil
from pathlib import Path
count = int(os.environ.get("MPSRUN_RESTART_COUNT", 0))
pipe_dir = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
def control(command):
    command = f"{command}\n".encode()
    return subprocess.run(["nvidia-cuda-mps-control"], input=command, capture_output=True).stdout.decode()
def sibling(role):
    found = [p for p in psutil.Process(os.getppid()).children() if role in " ".join(p.cmdline())]
    return found[0]
control("start_server -uid 0")
server = int(control("get_server_list").split()[-1])
daemon = psutil.Process(server).ppid()
time.sleep(float(os.environ.get("LET_LOOK", 0)))
if count:
    print("again", count, flush=True)
    sys.exit()
print("daemon", daemon, "server", server, flush=True)
"""
ILLEGAL = 'raise RuntimeError("CUDA error: an illegal memory access was encountered")\n'


def commands(logs: Path) -> list[str]:
    return [line.partition(" ")[2] for line in (logs / "commands").read_text().splitlines()]


def root_cause(text: str) -> list[str]:
    """The lines of the first report, up to the other failures."""
    found = text.partition("Root Cause")[2].partition("Other Failures")[0]
    return [line.strip() for line in found.splitlines()]


def value(lines: list[str], name: str) -> str:
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))


@pytest.fixture
def logs(runner: Runner, cuda_mps: Path, tmp_path: Path) -> Path:
    return tmp_path / "logs"


def test_a_worker_killed_in_a_kernel(runner: Runner, logs: Path) -> None:
    """The lead gets an error whose cause is the worker; the daemon is started anew before the script is."""
    runner.script(START + "os.kill(sibling('worker 1').pid, signal.SIGKILL)\ntime.sleep(.2)\n" + ILLEGAL)
    start = time.monotonic()
    done = runner.mpsrun("--workers", "2", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert time.monotonic() - start < 15
    assert (done.returncode, done.stdout.split()[-2:]) == (0, [b"again", b"1"])
    text = done.stderr.decode()
    assert value(root_cause(text), "role") == "worker 1"
    assert value(root_cause(text), "exitcode").startswith("-9 (SIGKILL) (pid: ")
    assert "CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS)" in text.partition("Other Failures")[2]
    daemons = {line.split()[0] for line in (logs / "commands").read_text().splitlines()}
    assert len(daemons) == 2, "the daemon is another one"
    assert commands(logs).count("quit") == 2


def test_without_restarts_the_report_comes_and_the_status_is_the_scripts(runner: Runner, logs: Path) -> None:
    runner.script(START + ILLEGAL)
    done = runner.mpsrun("--workers", "1", "--log-dir", "logs", "train.py")
    assert done.returncode == 1
    text = done.stderr.decode()
    assert value(root_cause(text), "role") == "lead"
    assert "RuntimeError: CUDA error: an illegal memory access" in text.partition("Root Cause")[2]
    assert "again" not in done.stdout.decode()


def test_the_error_of_the_script_alone_needs_no_new_daemon(runner: Runner, logs: Path) -> None:
    runner.script(START + "raise ValueError('of the script')")
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert done.returncode == 0
    assert value(root_cause(done.stderr.decode()), "role") == "lead"
    assert len({line.split()[0] for line in (logs / "commands").read_text().splitlines()}) == 1


def test_a_server_in_fault_is_not_used_again(runner: Runner, logs: Path) -> None:
    """The script's error looks like its own, but the daemon says FAULT: it is started anew."""
    runner.script(START + "(pipe_dir / 'status').write_text('FAULT')\nraise ValueError")
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert done.returncode == 0
    assert len({line.split()[0] for line in (logs / "commands").read_text().splitlines()}) == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_server_that_dies(runner: Runner, logs: Path, number: signal.Signals) -> None:
    """The lead's own error comes with it; the cause is the server."""
    runner.env["LET_LOOK"] = "0.7"  # the launcher has to know the server
    text = f"os.kill(server, {int(number)})\nraise RuntimeError('CUDA error: cudaErrorMpsRpcFailure')\n"
    runner.script(START + text)
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert done.returncode == 0
    said = done.stderr.decode()
    assert value(root_cause(said), "role") == "CUDA MPS server"
    assert "CUDA error 806 (CUDA_ERROR_MPS_RPC_FAILURE): the CUDA MPS server no longer answers" in said


@pytest.mark.slow
def test_a_server_that_dies_under_a_script_that_does_not_notice(runner: Runner, logs: Path, tmp_path: Path) -> None:
    """The script hangs in a wait for the GPU: it is ended, and started again."""
    runner.env["LET_LOOK"] = "0.7"
    runner.script(START + "os.kill(server, signal.SIGKILL)\nsignal.signal(signal.SIGTERM, lambda *_: 0)\n"
                  "while True: time.sleep(1)")  # fmt: skip
    start = time.monotonic()
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert (done.returncode, done.stdout.split()[-2:]) == (0, [b"again", b"1"])
    assert time.monotonic() - start < 45
    assert "has not ended 2 s after its CUDA MPS server" in done.stderr.decode()
    assert value(root_cause(done.stderr.decode()), "role") == "CUDA MPS server"


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_daemon_that_dies_or_hangs(runner: Runner, logs: Path, how: str) -> None:
    """It is started anew where the group is; a stopped one is killed with its server."""
    runner.script(START + f"os.kill(daemon, signal.{how})\ntime.sleep(.3)\n" + ILLEGAL)
    start = time.monotonic()
    done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert (done.returncode, done.stdout.split()[-2:]) == (0, [b"again", b"1"])
    assert time.monotonic() - start < 30
    if how == "SIGKILL":
        assert value(root_cause(done.stderr.decode()), "role") == "CUDA MPS daemon"


def test_a_script_goes_on_without_the_daemon(runner: Runner, logs: Path) -> None:
    """The server serves those that it has; one line tells of the daemon, and the server ends with the run."""
    runner.script(START + "os.kill(daemon, signal.SIGKILL)\ntime.sleep(4)\nprint('through')")
    done = runner.mpsrun("--workers", "1", "--log-dir", "logs", "train.py")
    assert (done.returncode, done.stdout.split()[-1]) == (0, b"through")
    assert done.stderr.count(b"the CUDA MPS daemon (pid ") == 1
    assert not psutil.pid_exists(int(done.stdout.split()[3]))


def test_a_worker_that_hangs_is_let_go_of_before_it_is_killed(runner: Runner, logs: Path) -> None:
    """The order of the end: asked to drain, taken from the server, killed."""
    text = (
        "worker = sibling('worker 1')\n(pipe_dir / 'clients').write_text(str(worker.pid))\n"
        "os.kill(worker.pid, signal.SIGSTOP)\nprint('worker', worker.pid, flush=True)"
    )
    runner.script(START + text)
    done = runner.mpsrun("--workers", "1", "--log-dir", "logs", "train.py")
    assert done.returncode == 0
    server, worker = (done.stdout.split()[i].decode() for i in (3, 5))
    assert f"terminate_client {server} {worker}" in commands(logs)
    assert commands(logs).index(f"terminate_client {server} {worker}") < commands(logs).index("quit")


def test_a_joined_daemon_that_stays_in_fault_is_left_and_named(runner: Runner, cuda_mps: Path) -> None:
    """It belongs to somebody else: no restart, and a line that says what to do."""
    pipe_dir = cuda_mps / "nobody"
    pipe_dir.mkdir()
    foreign = subprocess.Popen(["nvidia-cuda-mps-control", "-f"], env=runner.environ(), start_new_session=True)
    try:
        while not (pipe_dir / "environment").exists():
            time.sleep(0.01)
        (pipe_dir / "status").write_text("FAULT")
        runner.script(START + ILLEGAL)
        done = runner.mpsrun("--workers", "1", "--max-restarts", "1", "train.py")
        assert done.returncode == 1
        assert "not started again: expected the CUDA MPS in" in done.stderr.decode()
        assert foreign.poll() is None
    finally:
        for process in [*psutil.Process(foreign.pid).children(), foreign]:
            process.kill()
        foreign.wait()
