"""The worker processes that the tests share, and tests' ways to look at them."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import pytest

from mpsrun import config
from mpsrun.config import Config
from mpsrun.run import report, session, verify
from mpsrun.run.coordinator import Coordinator

WORKERS = 4
START_S = 60.0
SHARED = Config(workers=WORKERS, lanes="workers", timeout_s=30.0, worker_restarts=0)


def start(settings: Config = SHARED, kind: str = "cpu", healthy: bool = True, begin: bool = True) -> Coordinator:
    """Make `settings` this process's own and start its workers; returns once all of them are there.

    Some may be lost already where they are not `healthy`. Without `begin` they are not told to open their device.
    """
    stop()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.to_env().items():
            patch.setenv(name, value)
        config.current.cache_clear()
        config.current()
        # One thread a worker, as in the lead: the same kernels run, whatever machine this is.
        patch.setattr("mpsrun.run.pool.available_cores", lambda: 1)
        coordinator = session.coordinator(kind)
        assert coordinator is not None, session.why_none()
        if begin:
            coordinator.begin()
    wait_until(
        lambda: all(link.started or link.lost or (link.pid and not begin) for link in coordinator.links), START_S
    )
    assert not healthy or lost(coordinator) == {}
    return coordinator


def stop() -> None:
    """End the workers, if there are any."""
    session.close()
    config.current.cache_clear()


def current() -> Coordinator | None:
    """The coordinator that is open, if any."""
    return session.current()


def shared() -> Coordinator:
    """The shared workers, started where they are not there or one of them is lost."""
    coordinator = current()
    if coordinator is None or lost(coordinator) or coordinator.settings.worker_count() != WORKERS:
        coordinator = start()
    return coordinator


def lost(coordinator: Coordinator) -> dict[int, str]:
    """The reasons of the workers that are lost."""
    return {link.index: link.lost for link in coordinator.links if link.lost is not None}


def pids() -> set[int]:
    """The processes of the open pool."""
    coordinator = current()
    return {link.pid for link in coordinator.links if link.pid is not None} if coordinator else set()


def verify_steps(coordinator: Coordinator, steps: int, patch: pytest.MonkeyPatch) -> None:
    """Have `steps` calls of everything that is compiled from now on verified, with the lines of --verbose."""
    settings = dataclasses.replace(coordinator.settings, verify=steps, verbose=True)
    patch.setattr(config, "current", lambda: settings)
    patch.setattr(verify, "_all", [])
    patch.setattr(verify, "_said", False)
    report.graphs.clear()


def settle(coordinator: Coordinator) -> None:
    """Wait until the workers owe nothing."""
    wait_until(lambda: not any(link.owed for link in coordinator.links))


def wait_until(done: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until `done()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)


@contextlib.contextmanager
def running(settings: Config, kind: str = "cpu", healthy: bool = True) -> Iterator[Coordinator]:
    """Workers under other settings than the shared ones."""
    coordinator = start(settings, kind, healthy)
    try:
        yield coordinator
    finally:
        stop()
