"""Options, which tests run where, and the workers that all tests share."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from mpsrun.launch.hardware import detect

RUNTIME = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take longer than a minute")
    parser.addoption("--gpu", action="store_true", help="run only the tests that need an NVIDIA GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the run directories of the tests apart from those of other runs on this machine."""
    config.stash[RUNTIME] = os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="mpsrun-test-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[RUNTIME], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    hardware = detect()
    for item in items:
        if "gpu" in item.keywords and hardware.kind != "nvidia":
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {hardware.reason}"))
        if "gpu" not in item.keywords and config.getoption("--gpu"):
            item.add_marker(pytest.mark.skip(reason="needs no GPU, and --gpu is given"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _end_of_session() -> Iterator[None]:
    yield
    import pool

    pool.stop()


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind(_end_of_session: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, socket, run directory or shared memory outlives a test module, but the shared workers."""
    from footprint import Footprint

    before, failed = Footprint.now(), request.session.testsfailed
    yield
    if request.session.testsfailed == failed:  # the tracebacks of failed tests keep what they used
        before.wait_until_gone()


@pytest.fixture(autouse=True)
def _fresh_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test compiles for itself, and computes with one thread as the workers do."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    for name in [n for n in vars(request.module) if n.startswith(("__compiled_fn", "__resume_at"))]:
        setattr(request.module, name, None)  # what Dynamo leaves of a network with a graph break


@pytest.fixture
def workers() -> "Iterator[object]":
    """The coordinator of the shared workers; a worker that an earlier test lost is replaced."""
    import pool

    coordinator = pool.shared()
    yield coordinator
    assert pool.lost(coordinator) == {}
    pool.settle(coordinator)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Every slot of the arena is free again at the end."""
    import pool
    import torch

    yield
    torch._dynamo.reset()
    gc.collect()
    coordinator = pool.current()
    assert coordinator is not None
    with coordinator.lock:
        assert coordinator._arena.in_use - len(coordinator._retired) == 0
