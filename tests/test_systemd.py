"""The units of systemd/, as the scripts install them below a folder, judged by systemd's own tool."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEM, USER = "etc/systemd/system/mpsrun-daemon.service", "home/.config/systemd/user/mpsrun-daemon.service"
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
MOST_EXPOSED = 5.0  # "medium" begins here


def run(script: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"DESTDIR": str(folder), "HOME": "/home"}
    environ.pop("XDG_CONFIG_HOME", None)
    return subprocess.run(
        [ROOT / "scripts" / script, *args], env=environ, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def command(tmp_path: Path) -> Path:
    path = tmp_path / "mpsrun"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "wanted"), [((), {SYSTEM, "etc/tmpfiles.d/mpsrun.conf"}), (("--user",), {USER})], ids=["system", "user"]
)
def test_installed_and_removed_twice(tmp_path: Path, command: Path, args: tuple[str, ...], wanted: set[str]) -> None:
    folder = tmp_path / "root"
    for _ in range(2):
        done = run("install-service", folder, *args, "--mpsrun", str(command))
        assert done.returncode == 0, done.stderr
        assert files(folder) == wanted
    unit = folder / (USER if args else SYSTEM)
    assert f"\nExecStart={command} daemon run" in unit.read_text()
    assert "@" not in re.sub(r"^#.*|@system-service", "", unit.read_text(), flags=re.MULTILINE)
    for _ in range(2):
        assert run("uninstall-service", folder, *args).returncode == 0
        assert files(folder) == set()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--mpsrun", "/nowhere/mpsrun"), "expected a command in /nowhere/mpsrun"),
        (("--mpsrun", "mpsrun"), "expected an absolute path"),
        (("--sytem",), "expected --user or --mpsrun PATH, found --sytem"),
    ],
)
def test_wrong_calls_install_nothing(tmp_path: Path, args: tuple[str, ...], complaint: str) -> None:
    done = run("install-service", tmp_path, *args)
    assert (done.returncode, files(tmp_path)) == (2, set())
    assert complaint in done.stderr


@needs_systemd
@pytest.mark.parametrize("scope", ["system", "user"])
def test_units_are_valid(tmp_path: Path, command: Path, scope: str) -> None:
    run("install-service", tmp_path / "root", *(["--user"] if scope == "user" else []), "--mpsrun", str(command))
    unit = tmp_path / "root" / (USER if scope == "user" else SYSTEM)
    done = subprocess.run(
        [str(ANALYZE), f"--{scope}", "verify", "--man=no", unit],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if "mpsrun" in line]
    assert (done.returncode, told) == (0, []), done.stderr


@needs_systemd
def test_the_system_unit_is_not_exposed(tmp_path: Path, command: Path) -> None:
    run("install-service", tmp_path / "root", "--mpsrun", str(command))
    done = subprocess.run(
        [str(ANALYZE), "security", "--offline=true", "--no-pager", tmp_path / "root" / SYSTEM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < MOST_EXPOSED, done.stdout
