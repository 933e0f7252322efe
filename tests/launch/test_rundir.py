"""The run directory: private, swept, and refused where it is not ours."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from mpsrun.config import Config
from mpsrun.errors import UsageError
from mpsrun.launch.rundir import RECORD, base_dir, private_run_dir


@pytest.fixture(autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return runtime / "mpsrun"


def test_private_and_gone_at_the_end(base: Path) -> None:
    with private_run_dir() as run_dir:
        assert run_dir.parent == base
        assert stat.S_IMODE(run_dir.stat().st_mode) == stat.S_IMODE(base.stat().st_mode) == 0o700
        assert f"pid {os.getpid()}\n" in (run_dir / RECORD).read_text()
        assert Config(run_dir=run_dir).worker_socket(1) == f"ipc://{run_dir}/worker-1"
        (run_dir / "mps").mkdir()
    assert not run_dir.exists()


def test_runs_beside_each_other_leave_each_other_alone() -> None:
    with private_run_dir() as first, private_run_dir() as second:
        assert first != second
        assert first.exists()


def test_directories_of_dead_runs_are_swept(base: Path) -> None:
    with private_run_dir():
        dead, unfinished, alive = (base / name for name in ("dead", "unfinished", "alive"))
        for directory in (dead, unfinished, alive):
            directory.mkdir()
        (dead / RECORD).touch()
        (base / "link").symlink_to("/")
        with (alive / RECORD).open("w") as record:
            fcntl.flock(record, fcntl.LOCK_EX)
            with private_run_dir():
                assert not dead.exists()
                assert not unfinished.exists()
                assert alive.exists()
                assert (base / "link").is_symlink()


def test_a_link_is_refused(base: Path, tmp_path: Path) -> None:
    base.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        base_dir()


def test_a_foreign_directory_is_refused(base: Path) -> None:
    base.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(base, 12345, 12345)
    with pytest.raises(UsageError, match="user 12345"):
        base_dir()


def test_an_open_directory_is_closed(base: Path) -> None:
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    assert stat.S_IMODE(base_dir().stat().st_mode) == 0o700


def test_without_a_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nosuch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert base_dir() == tmp_path / f"mpsrun-{os.getuid()}"
