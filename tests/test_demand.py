"""What kernels ask of a GPU's multiprocessors, from a trace of torch's profiler."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpsrun.run import demand, recorder
from mpsrun.run.demand import Demand, Kernel, Multiprocessors, kernels_of

H100 = Multiprocessors(count=132, threads=2048, registers=65536, shared_bytes=233472)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        (Kernel(blocks=132, threads=1024, registers=32, shared_bytes=0, us=1.0), 0.5),  # two blocks by threads
        (Kernel(blocks=132, threads=256, registers=255, shared_bytes=0, us=1.0), 1.0),  # one block by registers
        (Kernel(blocks=66, threads=128, registers=0, shared_bytes=100_000, us=1.0), 0.25),  # two by shared memory
        (Kernel(blocks=33, threads=32, registers=0, shared_bytes=0, us=1.0), 33 / (132 * 32)),
        (Kernel(blocks=1320, threads=1024, registers=64, shared_bytes=0, us=1.0), 1.0),  # ten full waves
        (
            Kernel(blocks=330, threads=1024, registers=0, shared_bytes=0, us=1.0),
            0.625,
        ),  # one wave, and a quarter of one
        (Kernel(blocks=1, threads=1024, registers=255, shared_bytes=10**6, us=1.0), 1 / 132),
    ],
)
def test_what_a_kernel_fills(kernel: Kernel, wanted: float) -> None:
    assert kernel.demand(H100) == pytest.approx(wanted)


def test_long_kernels_count_more() -> None:
    short = Kernel(blocks=132, threads=1024, registers=0, shared_bytes=0, us=1.0)
    long = Kernel(blocks=264 * 9, threads=1024, registers=0, shared_bytes=0, us=3.0)
    demand_of_both = Demand.of([short, long], H100)
    assert demand_of_both == Demand(kernel_us=4.0, full_us=3.5)
    assert demand_of_both.share == pytest.approx((0.5 + 3.0) / 4)
    assert Demand.of([], H100).share is None


TOLD = {"grid": [4, 3, 2], "block": [32, 2, 1], "registers per thread": 40, "shared memory": 512}
MARK = {"name": f"at::cuda::{demand.MARKER}(long)", "cat": "kernel", "dur": 1.0, "args": TOLD}


def event(ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"name": "gemm", "cat": "kernel", "ts": ts, "dur": dur, "args": TOLD} | more


# Two runs, out of order as in a trace of several streams, with what is launched before, between and after them.
TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        MARK | {"ts": 40.0},
        event(1.0, 7.0),
        MARK | {"ts": 10.0},
        event(13.0, 2.5),
        event(12.0, 1.5),
        event(14.0, 9.0, cat="gpu_memcpy", args={"bytes": 4}),
        MARK | {"ts": 20.0},
        event(25.0, 7.0),
        MARK | {"ts": 30.0},
        event(50.0, 7.0),
    ]
}


def test_kernels_are_read_from_a_trace() -> None:
    assert kernels_of(TRACE) == [
        [Kernel(24, 64, 40, 512, 1.5), Kernel(24, 64, 40, 512, 2.5)],
        [Kernel(24, 64, 40, 512, 7.0)],
        [],
        [Kernel(24, 64, 40, 512, 7.0)],
    ]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU with a profiler that always tells `TRACE`; what was said."""
    lines: list[str] = []

    class Profiler:
        def start(self) -> None:
            pass

        def stop(self) -> None:
            assert recorder._alone._is_owned(), "it waits for the device, which would end what another thread records"

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps(TRACE))

    monkeypatch.setattr(demand, "profile", lambda **_: Profiler())
    monkeypatch.setattr(demand, "_mark", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(Multiprocessors, "of_current", lambda: H100)
    monkeypatch.setattr(demand.log, "say", lines.append)
    demand._say_why.cache_clear()
    return lines


def test_each_run_has_its_demand(said: list[str]) -> None:
    ran: list[int] = []
    first, second = demand.measure([lambda: ran.append(1), lambda: ran.append(2)]) or []
    assert ran == [1, 2]
    assert (first.kernel_us, second.kernel_us) == (4.0, 0.0)
    assert said == []


def test_a_trace_without_the_runs(said: list[str]) -> None:
    assert demand.measure([lambda: None] * 3) is None
    assert "found 2 runs in its trace of 3" in said[0]


def test_a_profiler_that_cannot_be_had_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(demand.log, "say", said.append)

    def unavailable(**_options: object) -> None:
        raise RuntimeError("CUPTI is used by somebody else")

    monkeypatch.setattr(demand, "profile", unavailable)
    demand._say_why.cache_clear()
    assert demand.measure([lambda: torch.ones(1)]) is None
    assert demand.measure([lambda: torch.ones(1)]) is None
    (line,) = said
    assert "CUPTI is used by somebody else" in line
