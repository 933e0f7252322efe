"""Shares of a GPU's multiprocessors: which of them make up a share, and what the driver is asked for."""

# ruff: noqa: N802 - the driver's own names

from collections.abc import Iterator
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpsrun.device import CpuDevice
from mpsrun.device import shares as module
from mpsrun.device.shares import WHOLE, GreenContexts, groups_of, shares, stream_on
from mpsrun.errors import MpsrunError


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 914
    CUDA_ERROR_NOT_SUPPORTED = 801


class Driver:
    """Stands for the CUDA driver: 132 multiprocessors in groups of 8, with 12 that make no group, as on an H100."""

    CUresult = Status
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)

    def __init__(self, mixes: bool = True, has: bool = True) -> None:
        self._mixes, self._has = mixes, has
        self.contexts: list[int] = []  # how many multiprocessors each has
        self.streams: list[int] = []  # the context of each

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, index

    def cuDeviceGetDevResource(self, _device: int, _kind: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, part(132)

    def cuDevSmResourceSplitByCount(self, count: int, whole: Any, _flags: int, least: int) -> tuple[Any, ...]:
        if not self._has:
            return Status.CUDA_ERROR_NOT_SUPPORTED, None, None, None
        made = min(count, (whole.sm.smCount - 12) // least)
        return Status.CUDA_SUCCESS, [part(least) for _ in range(made)], made, part(12)

    def cuDevResourceGenerateDesc(self, parts: list[Any], count: int) -> tuple[Any, ...]:
        assert len(parts) == count
        sizes = [part.sm.smCount for part in parts]
        if not self._mixes and len({*sizes}) > 1:
            return Status.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, None
        return Status.CUDA_SUCCESS, sum(sizes)

    def cuGreenCtxCreate(self, described: int, _device: int, _flags: int) -> tuple[Any, ...]:
        self.contexts.append(described)
        return Status.CUDA_SUCCESS, len(self.contexts) - 1

    def cuGreenCtxStreamCreate(self, context: int, flags: int, _priority: int) -> tuple[Any, ...]:
        assert flags == 1  # other streams are refused
        self.streams.append(context)
        return Status.CUDA_SUCCESS, 0x1000 + len(self.streams)


def part(count: int) -> Any:
    return SimpleNamespace(sm=SimpleNamespace(smCount=count, minSmPartitionSize=8))


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda raw, device: (raw, device.index))
    shares.cache_clear()
    yield
    shares.cache_clear()


def test_a_share_is_made_of_whole_groups() -> None:
    driver = Driver()
    contexts = GreenContexts(0, driver)
    for start, percent in ((0, 25), (25, 50), (75, 25), (0, 1)):
        contexts.stream(-1, start, percent)
    assert driver.contexts == [32, 64, 3 * 8 + 12, 8]


def test_a_share_is_made_once() -> None:
    driver = Driver()
    contexts = GreenContexts(2, driver)
    assert contexts.stream(-1, 0, 50) == (0x1001, 2)
    contexts.stream(-1, 1, 49)  # the same groups
    contexts.stream(-2, 0, 50)  # another lane, in the same context
    assert driver.streams == [0, 0, 0]


def test_what_makes_no_group_may_be_left_over() -> None:
    driver = Driver(mixes=False)
    GreenContexts(0, driver).stream(-1, 50, 50)
    assert driver.contexts == [(15 - 8) * 8]


def test_a_driver_without_green_contexts() -> None:
    with pytest.raises(MpsrunError, match="CUDA_ERROR_NOT_SUPPORTED"):
        GreenContexts(0, Driver(has=False))


def test_a_cpu_has_none() -> None:
    found = shares(torch.device("cpu"))
    assert "no multiprocessors" in (found.refusal or "")
    with pytest.raises(MpsrunError, match="lane -1"):
        found.stream(-1, 0, 50)
    with CpuDevice().share(0, 50):
        torch.zeros(1)


def test_a_lane_without_its_share_has_the_whole_gpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "own_stream", lambda device: ("ordinary", device))
    assert stream_on(torch.device("cpu"), -1, WHOLE) == ("ordinary", torch.device("cpu"))
    assert capfd.readouterr().err == ""
    assert stream_on(torch.device("cpu"), -1, (0, 40)) == ("ordinary", torch.device("cpu"))
    assert "the whole GPU instead of 40%" in capfd.readouterr().err


def test_without_a_gpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1))
    monkeypatch.setattr(module, "GreenContexts", lambda *_: GreenContexts(0, Driver(has=False)))
    pytest.importorskip("cuda.bindings.driver")
    assert "failed" in (shares(torch.device("cuda", 0)).refusal or "")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(8, 40))
def test_shares_that_follow_each_other_have_nothing_in_common(percents: list[int], count: int) -> None:
    start, taken = 0, set[int]()
    for percent in percents:
        if start + percent > 100:
            break
        if percent * count < 100:  # less than a group: one is taken all the same
            continue
        groups = groups_of(start, percent, count)
        assert taken.isdisjoint(groups)
        taken |= {*groups}
        assert abs(len(groups) - percent * count / 100) <= 1
        start += percent
    assert groups_of(*WHOLE, count) == tuple(range(count))
