"""What kernels ask of a GPU's multiprocessors, from a trace of torch's profiler."""

import pytest
import torch

from mpsrun.run import demand
from mpsrun.run.demand import Kernel, Multiprocessors, kernels_of, sm_demand

H100 = Multiprocessors(count=132, threads=2048, registers=65536, shared_bytes=233472)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        (Kernel(blocks=132, threads=1024, registers=32, shared_bytes=0, us=1.0), 0.5),  # two blocks by threads
        (Kernel(blocks=132, threads=256, registers=255, shared_bytes=0, us=1.0), 1.0),  # one block by registers
        (Kernel(blocks=66, threads=128, registers=0, shared_bytes=100_000, us=1.0), 0.25),  # two by shared memory
        (Kernel(blocks=33, threads=32, registers=0, shared_bytes=0, us=1.0), 33 / (132 * 32)),
        (Kernel(blocks=10**6, threads=1024, registers=64, shared_bytes=0, us=1.0), 1.0),
        (Kernel(blocks=1, threads=1024, registers=255, shared_bytes=10**6, us=1.0), 1 / 132),
    ],
)
def test_what_a_kernel_fills(kernel: Kernel, wanted: float) -> None:
    assert kernel.demand(H100) == pytest.approx(wanted)


def test_long_kernels_count_more() -> None:
    short = Kernel(blocks=132, threads=1024, registers=0, shared_bytes=0, us=1.0)
    long = Kernel(blocks=10**6, threads=1024, registers=0, shared_bytes=0, us=3.0)
    assert sm_demand([short, long], H100) == pytest.approx((0.5 + 3.0) / 4)
    assert sm_demand([], H100) is None


def test_kernels_are_read_from_a_trace() -> None:
    told = {"grid": [4, 3, 2], "block": [32, 2, 1], "registers per thread": 40, "shared memory": 512}
    trace = {
        "traceEvents": [
            {"cat": "kernel", "dur": 2.5, "args": told},
            {"cat": "gpu_memcpy", "dur": 9.0, "args": {"bytes": 4}},
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        ]
    }
    assert kernels_of(trace) == [Kernel(24, 64, 40, 512, 2.5)]


def test_a_profiler_that_cannot_be_had_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(demand.log, "say", said.append)

    def unavailable(**_options: object) -> None:
        raise RuntimeError("CUPTI is used by somebody else")

    monkeypatch.setattr(demand, "profile", unavailable)
    demand._say_why.cache_clear()
    assert demand.measure(lambda: torch.ones(1)) is None
    assert demand.measure(lambda: torch.ones(1)) is None
    (line,) = said
    assert "CUPTI is used by somebody else" in line
