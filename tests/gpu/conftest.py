"""A private CUDA MPS daemon for the GPU tests, and workers that are its clients."""

import os
from collections.abc import Iterator

import pool
import pytest

from mpsrun.config import Config
from mpsrun.launch.rundir import private_run_dir
from mpsrun.launch.spawn import spawn_guard
from mpsrun.mps.lifecycle import cuda_mps
from mpsrun.run.coordinator import Coordinator


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
