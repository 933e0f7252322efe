"""What keeps CUDA MPS from working is recognised before anything is started, and told with its fix."""

import functools
import os
import pwd
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mpsrun.config import Config
from mpsrun.errors import UsageError
from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps import joining, lifecycle, surroundings
from mpsrun.mps.control import PIPE_DIRECTORY
from mpsrun.mps.surroundings import Obstacle
from tests.monitor.conftest import put_fake_nvml
from tests.mps.conftest import Start

GUARD = functools.partial(spawn_guard, parent_pid=os.getpid())


def put(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def listen(pipe_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(pipe_dir / "control"))


@pytest.mark.parametrize(
    ("recognise", "name", "text", "fix"),
    [
        (surroundings.wsl, "proc/sys/kernel/osrelease", "5.15.90.1-microsoft-standard-WSL2", "--lanes streams"),
        (surroundings.wsl, "dev/dxg", "", "use Linux itself"),
        (surroundings.jetson, "etc/nv_tegra_release", "# R36", "--lanes streams"),
        (surroundings.jetson, "proc/device-tree/model", "NVIDIA Jetson AGX Orin\0", "--lanes streams"),
    ],
)
def test_machines(tmp_path: Path, recognise: Callable[[Path], Obstacle | None], name: str, text: str, fix: str) -> None:
    assert recognise(tmp_path) is None
    put(tmp_path, "proc/sys/kernel/osrelease", "6.1.0-amd64")
    assert recognise(tmp_path) is None
    found = recognise(put(tmp_path, name, text))
    assert found is not None
    assert fix in found.fix


def test_modes_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = put_fake_nvml(monkeypatch)
    assert surroundings.multi_instance() is surroundings.exclusive_process() is surroundings.prohibited() is None
    fake.mig = 1
    assert "sudo nvidia-smi -mig 0" in str(surroundings.multi_instance())
    fake.compute_mode = 3
    assert "sudo nvidia-smi -c DEFAULT" in str(surroundings.exclusive_process())
    fake.compute_mode = 2
    assert "compute mode prohibited; sudo nvidia-smi -c DEFAULT" in str(surroundings.prohibited())
    fake.fails = True
    assert surroundings.multi_instance() is surroundings.prohibited() is None


def test_a_daemon_of_another_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_dir = tmp_path_factory.mktemp("p")
    assert surroundings.foreign_owner(pipe_dir) is None
    listen(pipe_dir)
    assert surroundings.foreign_owner(pipe_dir) is None, "our own"
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    nobody = pwd.getpwnam("nobody")
    os.chown(pipe_dir / "control", nobody.pw_uid, nobody.pw_gid)
    found = surroundings.foreign_owner(pipe_dir)
    assert found is not None
    assert "belongs to user nobody" in found.found
    assert found.fix == "unset CUDA_MPS_PIPE_DIRECTORY, or have root run the daemon"


def test_a_container_beside_the_daemon(tmp_path: Path) -> None:
    pipe_dir, root = tmp_path / "pipe", tmp_path / "root"
    put(pipe_dir, "nvidia-cuda-mps-control.pid", "17\n")
    assert surroundings.other_namespace(pipe_dir, root) is None, "no container"
    put(root, ".dockerenv")
    assert "--ipc=host --pid=host" in str(surroundings.other_namespace(pipe_dir, root))
    put(root, "proc/17/comm", "bash\n")
    assert surroundings.other_namespace(pipe_dir, root) is not None, "somebody else has that pid here"
    put(root, "proc/17/comm", "nvidia-cuda-mps\n")
    assert surroundings.other_namespace(pipe_dir, root) is None, "the daemon is in this container"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("mig", 1, "no CUDA MPS (a GPU in MIG mode; name one instance of `nvidia-smi -L`"),
        ("compute_mode", 2, "no CUDA MPS (a GPU in compute mode prohibited; sudo nvidia-smi -c DEFAULT)"),
    ],
)
def test_a_run_is_told_and_goes_on(
    fake_program: Path,
    pipe_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    field: str,
    value: int,
    said: str,
) -> None:
    setattr(put_fake_nvml(monkeypatch), field, value)
    config = Config(workers=1, run_dir=tmp_path)
    with lifecycle.cuda_mps(config, True, "", GUARD):
        assert not config.mps_pipe_dir.exists()
    assert said in capfd.readouterr().err
    with pytest.raises(UsageError, match="sudo nvidia-smi"):
        with lifecycle.cuda_mps(Config(workers=1, run_dir=tmp_path, mps="on"), True, "", GUARD):
            pass


def test_time_slices_on_an_exclusive_gpu(
    pipe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put_fake_nvml(monkeypatch).compute_mode = 3
    monkeypatch.setenv("PATH", "/nosuch")
    with lifecycle.cuda_mps(Config(workers=1, run_dir=tmp_path), True, "", GUARD):
        pass
    assert "exclusive-process mode, which without CUDA MPS takes one process only; use" in capfd.readouterr().err


def test_a_foreign_daemon_that_is_named_is_not_joined(
    fake_program: Path, pipe_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "first_obstacle_to_joining", lambda _path: Obstacle("somebody's", "ask them"))
    assert joining.daemon_to_join() is None
    assert capfd.readouterr().err == "mpsrun: somebody's; ask them\n"
    monkeypatch.delenv(PIPE_DIRECTORY)
    monkeypatch.setattr(joining, "DEFAULT_PIPE_DIR", pipe_dir)
    assert joining.daemon_to_join() is None
    assert capfd.readouterr().err == "", "nobody named it"
