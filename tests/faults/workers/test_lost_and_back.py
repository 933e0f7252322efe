"""Every fault of a worker in every phase of a step: training goes on, the worker comes back, the curve is the same."""

import time
from typing import Any

import pytest

from mpsrun.run.coordinator import Coordinator
from tests.faults.workers.conftest import BACK_S, SPARE_S, WATCHDOG_S, Orders, Training

SILENT = f"no answer for {WATCHDOG_S:g} s"
FAULTS = {  # and what is said of it
    "SIGKILL": "process {pid} ended",
    "SIGSEGV": "process {pid} ended",
    "exit": "process {pid} ended",
    "exception": "RuntimeError: planted: an error",
    "SIGSTOP": SILENT,
    "hang": SILENT,
    "spin": SILENT,
    "cut": "MpsrunError: expected a message on the socket, found none for 1 s: it was cut",
}
IN_A_HURRY = {
    "forward": {"SIGKILL", "exception"},
    "backward": {"hang"},
    "between": {"cut"},
}
ROWS = [
    pytest.param(phase, fault, marks=() if fault in IN_A_HURRY[phase] else pytest.mark.slow, id=f"{fault}-{phase}")
    for phase in IN_A_HURRY
    for fault in FAULTS
]


@pytest.mark.parametrize(("phase", "fault"), ROWS)
def test_the_worker_comes_back(lively: Coordinator, orders: Orders, phase: str, fault: str, capfd: Any) -> None:
    training, link = Training(lively), lively.links[0]
    for _ in range(3):
        training.step()
    training.longest_s = 0.0
    orders.give(1, phase, fault)
    if phase == "between":
        lively.counts(timeout_s=0.1)
    training.steps_until(orders.are_followed, SPARE_S)
    lively.counts(timeout_s=0.1)  # something on the socket
    start = time.monotonic()
    training.steps_until(lambda: training.works_in(1, link.generation + 1), WATCHDOG_S + BACK_S)
    assert time.monotonic() - start < WATCHDOG_S + BACK_S
    assert training.longest_s < WATCHDOG_S + SPARE_S
    training.assert_undisturbed()
    told = capfd.readouterr().err
    assert f"worker 1 is out: {FAULTS[fault].format(pid=link.pid)}; it is started again" in told
    assert f"worker 1 is back (pid {lively.links[0].pid})" in told
    assert lively.present() == [1, 2]
