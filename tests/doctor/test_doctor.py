"""The doctor's table: on this machine, and on machines that are made up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpsrun.checkout import with_package
from mpsrun.doctor import checks, command, roundtrip
from mpsrun.doctor.checks import Machine
from mpsrun.errors import UsageError
from mpsrun.monitor import nvml
from tests.monitor.fake_pynvml import FakeNvml


def by_name(environ: dict[str, str] | None = None) -> dict[str, checks.Check]:
    return {check.name: check for check in checks.run_all(environ)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without starting two processes."""
    monkeypatch.setattr(checks, "_round_trip", lambda _kind: 3.0)


def test_the_command_on_this_machine() -> None:
    """A real round trip between two processes is part of it."""
    environ = with_package(os.environ)
    done = subprocess.run(
        [sys.executable, "-m", "mpsrun", "doctor", "--json"], env=environ, capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout)["checks"]
    assert all(set(check) == {"name", "status", "found", "fix"} for check in found)
    assert len(found) == len(checks.CHECKS) == len({check["name"] for check in found})
    assert done.returncode == any(check["status"] == "fail" for check in found)
    assert all(check["fix"] for check in found if check["status"] != "ok")
    (ipc,) = (check for check in found if check["name"] == "IPC")
    assert ipc["status"] == "ok"


def test_a_table_for_people(quick: None, capsys: pytest.CaptureFixture[str], fake_nvml: FakeNvml) -> None:
    status = command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks.CHECKS) + 1
    assert status == any(" fail " in line for line in lines)
    with pytest.raises(UsageError, match="found '--verbose'; a script of this name"):
        command.main(["--verbose"])


@pytest.mark.parametrize(
    ("changes", "name", "status", "fix"),
    [
        ({"compute_mode": 2}, "compute mode", "fail", "sudo nvidia-smi -c DEFAULT"),
        ({"compute_mode": 3}, "compute mode", "warn", "nvidia-smi -c DEFAULT, or --lanes serial"),
        ({"mig": 1}, "MIG", "fail", "sudo nvidia-smi -mig 0"),
        ({"reasons": 0x40}, "clocks", "warn", "see to cooling"),
        ({"has_gpm": False}, "GPM", "warn", "Hopper and later"),
        ({"denied": {"nvmlDeviceGetMemoryInfo"}}, "NVML", "warn", "plans do not adapt to it"),
        ({"fails": True}, "NVML", "warn", "the daemon's status has no memory"),
    ],
)
def test_what_nvml_shows(
    quick: None, fake_nvml: FakeNvml, changes: dict[str, object], name: str, status: str, fix: str
) -> None:
    for field, value in changes.items():
        setattr(fake_nvml, field, value)
    check = by_name()[name]
    assert check.status == status
    assert fix in check.fix


def test_a_gpu_that_is_well(quick: None, fake_nvml: FakeNvml) -> None:
    found = by_name()
    assert [found[name].status for name in ("driver", "compute mode", "MIG", "clocks", "NVML", "GPM")] == ["ok"] * 6
    assert nvml.modes()[0].name == "NVIDIA Fake"


def test_the_environment(quick: None, tmp_path: Path) -> None:
    found = by_name({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "XDG_RUNTIME_DIR": str(tmp_path)})
    assert found["expandable segments"].status == "warn"
    assert "take expandable_segments out of PYTORCH_ALLOC_CONF" in found["expandable segments"].fix
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    assert by_name({"XDG_RUNTIME_DIR": str(deep)})["socket path length"].status == "fail"


def test_a_round_trip_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks._round_trip("no such device")
    assert isinstance(found, float)  # anything but cuda is the CPU
    monkeypatch.setattr(checks, "ROUND_TRIP_S", 0.05)
    assert checks._round_trip("cpu") == "no answer within 0.05 s"
    machine = Machine({})
    monkeypatch.setattr(checks, "_round_trip", lambda _kind: "a wall")
    assert checks._ipc(machine).status == "fail"
    assert "two processes could not share" in checks._ipc(machine).found


@pytest.mark.gpu
def test_a_real_round_trip_on_the_gpu() -> None:
    assert 0 < roundtrip.ask("cuda") < 1000
