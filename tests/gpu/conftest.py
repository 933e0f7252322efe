"""A private CUDA MPS daemon for the GPU tests, and workers that are its clients."""

import os
from collections.abc import Iterator

import pool
import pytest
import torch

from mpsrun.config import Config
from mpsrun.launch.rundir import private_run_dir
from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps.lifecycle import cuda_mps
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.streams import CudaSides

LONG = 20_000_000  # cycles of the GPU: some 10 ms


@pytest.fixture(scope="session")
def daemon() -> Iterator[None]:
    """CUDA MPS, before this process touches the GPU."""
    with private_run_dir() as run_dir:
        settings = Config(run_dir=run_dir, workers=3, mps="on")
        with cuda_mps(settings, True, "", lambda pipe, log: spawn_guard(pipe, log, os.getpid())):
            yield
            pool.stop()


@pytest.fixture(scope="module")
def on_gpu(daemon: None) -> Iterator[Coordinator]:
    """Three workers on the GPU, for the tests of one file."""
    with pool.running(Config(workers=3, lanes="workers", timeout_s=60.0), "cuda") as coordinator:
        yield coordinator


@pytest.fixture(scope="module")
def expendable(daemon: None) -> Iterator[Coordinator]:
    """More workers than the tests of one file lose, under a short watchdog."""
    with pool.running(Config(workers=7, lanes="workers", timeout_s=4.0, worker_restarts=0), "cuda") as coordinator:
        yield coordinator


@pytest.fixture(params=["as it is", "slow sides"])
def sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side streams that start late would show a main stream that does not wait."""
    use = CudaSides.use

    def late(self: CudaSides, lane: int) -> None:
        use(self, lane)
        if lane:
            torch.cuda._sleep(LONG)

    if request.param == "slow sides":
        monkeypatch.setattr(CudaSides, "use", late)
