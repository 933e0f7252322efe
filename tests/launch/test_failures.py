"""Which failure is named as the first cause, when a run is started again, and the words for CUDA's errors."""

import datetime as dt
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from mpsrun.config import Config
from mpsrun.launch import error_file, restarts
from mpsrun.launch.failures import Failure, failure, in_order, poisoned, report
from mpsrun.launch.group import Outcome
from mpsrun.mps import faults

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered"
RPC = "AcceleratorError: CUDA error: the remote procedural call between the MPS server and the MPS client failed"


def failed(role: str, at_s: float, returncode: int | None = 1, message: str = "", **more: Any) -> Failure:
    return Failure(role, 7, returncode, at_s, NOW, message=message, **more)


ORDERS = {
    "the worker that was killed, not the lead whose context it took along": (
        [failed("lead", 10.9, 1, ILLEGAL), failed("worker 2", 10.0, -9)],
        "worker 2",
    ),
    "noticed at once, the deeper one": (
        [failed("lead", 10.0, 1, RPC), failed("worker 1", 10.1, 70, RPC), failed("CUDA MPS server", 10.4, None)],
        "CUDA MPS server",
    ),
    "the first in time, where they are apart": (
        [failed("CUDA MPS server", 12.0, None), failed("worker 1", 10.0, -11), failed("lead", 12.1, 1, RPC)],
        "worker 1",
    ),
    "an exception of the script has no other cause": (
        [failed("worker 1", 9.0, -9), failed("lead", 10.0, 1, "ValueError: of the script")],
        "lead",
    ),
    "a worker's error under --strict": (
        [failed("worker 1", 9.0, -9), failed("lead", 10.0, 1, "WorkerError: worker 1 is out")],
        "worker 1",
    ),
    "a worker that was lived without for long": (
        [failed("worker 1", 9.0, -9), failed("lead", 100.0, 1, ILLEGAL)],
        "lead",
    ),
    "the lead alone": ([failed("lead", 1.0, -11)], "lead"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_root_cause(name: str) -> None:
    given, wanted = ORDERS[name]
    for failures in (given, given[::-1]):
        found = in_order(failures)
        assert found[0].role == wanted
        assert sorted(map(id, found)) == sorted(map(id, given))


@pytest.mark.parametrize(
    ("failures", "wanted"),
    [
        ([failed("lead", 1.0, 1, "ValueError")], False),
        ([failed("lead", 1.0, 1, ILLEGAL)], True),
        ([failed("lead", 1.0, -11)], True),
        ([failed("lead", 1.0, -15)], False),
        ([failed("worker 1", 1.0, -9), failed("lead", 1.0, 1, "ValueError")], True),
        ([failed("CUDA MPS daemon", 1.0, None)], True),
    ],
)
def test_when_cuda_mps_may_be_harmed(failures: list[Failure], wanted: bool) -> None:
    assert poisoned(failures) is wanted


def test_the_report() -> None:
    worker = failed("worker 2", 10.0, -9, log=Path("/logs/worker-2.log"))
    lead = failed("lead", 11.0, 1, ILLEGAL, traceback=f"Traceback (most recent call last):\n  here\n{ILLEGAL}\n")
    lines = report("train.py", [lead, worker]).splitlines()
    assert lines[1] == "train.py FAILED"
    assert lines.index("Root Cause (first observed failure):") < lines.index("Other Failures:")
    first = lines[lines.index("[0]:") : lines.index("Other Failures:")]
    assert "  role      : worker 2" in first
    assert "  exitcode  : -9 (SIGKILL) (pid: 7)" in first
    assert "  log_file  : /logs/worker-2.log" in first
    assert "  traceback : Signal 9 (SIGKILL) received by PID 7" in first
    second = lines[lines.index("[1]:") :]
    assert "  log_file  : <N/A>" in second
    assert "--log-dir DIR keeps it" in report("train.py", [failed("worker 2", 10.0, -9)])
    assert f"    {ILLEGAL}" in second
    assert any(line.startswith("  meaning   : CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS): ") for line in second)


class TestErrorFile:
    def test_form(self, tmp_path: Path) -> None:
        """What torch.distributed.elastic writes and reads, and for this user alone."""
        path = tmp_path / "error.json"
        error_file.leave_error(path, raised(ValueError("näh")))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        message = json.loads(path.read_text())["message"]
        assert message["message"] == "ValueError: näh"
        assert message["extraInfo"]["py_callstack"].startswith("Traceback (most recent call last):\n")
        assert int(message["extraInfo"]["timestamp"]) > 1_700_000_000
        error_file.leave_error(path, ValueError("later"))
        found = error_file.read(path)
        assert found is not None
        assert found.message == "ValueError: näh"

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"message": 5}', "null", "\xff"])
    def test_what_cannot_be_read(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "error.json"
        path.write_text(text, encoding="latin1")
        assert error_file.read(path) is None
        assert failure("lead", 7, -11, 5.0, path).how() == "Signal 11 (SIGSEGV) received by PID 7"
        assert not path.exists()

    def test_torchelastics_older_form(self, tmp_path: Path) -> None:
        path = tmp_path / "error.json"
        path.write_text('{"message": "only a text", "more": 1}')
        assert failure("lead", 7, 1, 5.0, path).how() == "only a text"

    def test_its_time_counts(self, tmp_path: Path) -> None:
        """When it was raised, not when the end of the process was noticed."""
        path = tmp_path / "error.json"
        error_file.leave_error(path, ValueError())
        assert failure("lead", 7, 1, 1e12, path).at_s < 1e12

    def test_no_room(self, tmp_path: Path) -> None:
        error_file.leave_error(tmp_path / "no" / "such", ValueError())


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001
        return caught


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (ILLEGAL, 700),
        (RPC, 806),
        ("CUDA error: cudaErrorMpsConnectionFailed", 805),
        ("CUDA_ERROR_MPS_SERVER_NOT_READY", 807),
        ("CUDA driver: CUDA_ERROR_MPS_MAX_CLIENTS_REACHED", 808),
        ("CUDA error: the hardware resources required to support device connections have been exhausted", 809),
        ("CUDA error: the MPS client has been terminated by the server", 810),
        ("CUDA error: device-side assert triggered", 710),
        ("CUDA error: unspecified launch failure", 719),
        ("CUDA out of memory", None),
        ("CUDA error: invalid argument", None),
        ("an illegal memory access in my own words", None),
    ],
)
def test_words_for_errors_of_cuda(message: str, code: int | None) -> None:
    found = faults.find(message)
    assert (found.code if found else None) == code
    if found:
        assert str(found).startswith(f"CUDA error {code} (CUDA_ERROR_")
        assert found.advice


def test_each_error_of_cuda_mps_has_words() -> None:
    assert [fault.code for fault in faults.FAULTS][:6] == [805, 806, 807, 808, 809, 810]


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (Outcome(1), True),
        (Outcome(-9), True),
        (Outcome(None), True),
        (Outcome(0), False),
        (Outcome(2), False),
        (Outcome(4), False),
        (Outcome(-2, asked=True), False),
        (Outcome(1, asked=True), False),
    ],
)
def test_when_to_start_again(outcome: Outcome, again: bool) -> None:
    assert restarts.may_restart(outcome) is again


@pytest.mark.parametrize(
    ("failures", "config", "told"),
    [
        ([failed("lead", 1.0, 1, "ValueError")], Config(workers=1), False),
        ([failed("lead", 1.0, 1, "ValueError")], Config(workers=1, max_restarts=1), True),
        ([failed("lead", 1.0, 1, ILLEGAL)], Config(workers=1), True),
        ([failed("lead", 1.0, -11)], Config(workers=1), True),
        ([failed("lead", 1.0, -11)], Config(lanes="serial"), False),
        ([failed("lead", 1.0, -15)], Config(workers=1), False),
        ([failed("worker 1", 1.0, -9), failed("lead", 1.0, 1, "ValueError")], Config(workers=1), True),
    ],
)
def test_when_there_is_a_report(failures: list[Failure], config: Config, told: bool) -> None:
    assert restarts.is_told(Outcome(failures[-1].returncode, failures=tuple(failures)), config) is told
    assert not restarts.is_told(Outcome(0, failures=tuple(failures)), config)
    assert not restarts.is_told(Outcome(-2, True, tuple(failures)), config)


def test_what_the_script_is_told() -> None:
    assert restarts.environment(0, 0) == {}
    assert restarts.environment(1, 3, {}) == {
        "MPSRUN_RESTART_COUNT": "1",
        "MPSRUN_MAX_RESTARTS": "3",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }
    under_torchrun = {"TORCHELASTIC_RESTART_COUNT": "7", "TORCHELASTIC_MAX_RESTARTS": "9"}
    assert restarts.environment(1, 3, under_torchrun) == {"MPSRUN_RESTART_COUNT": "1", "MPSRUN_MAX_RESTARTS": "3"}
