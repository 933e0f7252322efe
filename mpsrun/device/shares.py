"""Streams that reach only a share of a GPU's multiprocessors: green contexts of the CUDA driver.

A green context takes part of the multiprocessors of the process's own context, shares its memory and modules, and works
in a client of CUDA MPS, too. A stream of one is used like any other; recorded into a CUDA graph, its kernels keep the
share (CUDA driver API, "Green Contexts"). Which share a kernel has is thus a matter of the stream that it is given to,
and is changed between two kernels without starting anything again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mpsrun import log
from mpsrun.device.driver import NON_BLOCKING, own_stream
from mpsrun.errors import MpsrunError

WHOLE = (0, 100)  # where a share starts and how large it is, in percent of the multiprocessors


class Shares(Protocol):
    """The streams with a share of one device; refusal: why there can be none, if so."""

    refusal: str | None

    def stream(self, lane: int, start_percent: int, percent: int) -> torch.cuda.Stream:
        """Another stream for a lane, on this part. Raises `MpsrunError` where there can be none."""


class NoShares:
    """A device whose kernels run wherever there is room."""

    def __init__(self, refusal: str) -> None:
        self.refusal: str | None = refusal

    def stream(self, lane: int, start_percent: int, percent: int) -> torch.cuda.Stream:
        raise MpsrunError(
            f"expected a device with shares for lane {lane} ({percent}% from {start_percent}%), found none"
        )


class GreenContexts:
    """Shares of one GPU, in groups of as many multiprocessors as it gives out together (8 on an H100).

    Contexts and streams live as long as the process, whose own context is current when they are made. Raises
    `MpsrunError` where the driver has no green contexts.
    """

    refusal: str | None = None

    def __init__(self, index: int, driver: Any) -> None:
        self._index, self._driver = index, driver
        self._lock = threading.Lock()
        self._contexts: dict[tuple[int, ...], Any] = {}  # by groups
        self._device = self._call("cuDeviceGet", index)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = self._call("cuDeviceGetDevResource", self._device, kind)
        least = whole.sm.minSmPartitionSize
        groups, count, rest = self._call("cuDevSmResourceSplitByCount", whole.sm.smCount // least, whole, 0, least)
        self._groups = list(groups)[: int(count)]
        if rest.sm.smCount and self._goes_with(rest):
            self._groups.append(rest)

    def _goes_with(self, rest: Any) -> bool:
        """Whether the multiprocessors that make no group (12 on an H100) may be in one context with a group."""
        try:
            self._call("cuDevResourceGenerateDesc", [self._groups[0], rest], 2)
        except MpsrunError:
            return False
        return True

    def stream(self, lane: int, start_percent: int, percent: int) -> torch.cuda.Stream:  # noqa: ARG002 - see NoShares
        groups = groups_of(start_percent, percent, len(self._groups))
        with self._lock:
            raw = self._call("cuGreenCtxStreamCreate", self._context(groups), NON_BLOCKING, 0)
        return torch.cuda.ExternalStream(int(raw), device=torch.device("cuda", self._index))

    def _context(self, groups: tuple[int, ...]) -> Any:
        if groups not in self._contexts:
            members = [self._groups[group] for group in groups]
            described = self._call("cuDevResourceGenerateDesc", members, len(members))
            flags = int(self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)  # the only kind that there is
            self._contexts[groups] = self._call("cuGreenCtxCreate", described, self._device, flags)
        return self._contexts[groups]

    def _call(self, name: str, *args: Any) -> Any:
        function: Callable[..., Any] = getattr(self._driver, name)
        status, *values = function(*args)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise MpsrunError(f"{name} failed: {self._driver.CUresult(status).name}")
        return values[0] if len(values) == 1 else tuple(values)


def groups_of(start_percent: int, percent: int, count: int) -> tuple[int, ...]:
    """The groups of multiprocessors, of `count`, that make up a share; at least one.

    Shares that follow each other have no group in common.
    """
    first = round(start_percent * count / 100)
    last = max(first + 1, round((start_percent + percent) * count / 100))
    return tuple(sorted({group % count for group in range(first, last)}))


def stream_on(device: torch.device, lane: int, place: tuple[int, int]) -> torch.cuda.Stream:
    """Another stream for a lane on its part of a GPU; on the whole GPU, and one line why, where it cannot be less."""
    if place != WHOLE:
        try:
            return shares(device).stream(lane, *place)
        except MpsrunError as error:
            log.say(f"a lane has the whole GPU instead of {place[1]}%: {error}")
    return own_stream(device)


@functools.cache
def shares(device: torch.device) -> Shares:
    """The shares of a device, which is named with its index."""
    if device.type != "cuda":
        return NoShares(f"{device.type} has no multiprocessors to share out")
    try:
        from cuda.bindings import driver

        torch.zeros(1, device=device)  # makes the process's own context current
        return GreenContexts(device.index, driver)
    except (ImportError, AttributeError) as error:
        return NoShares(f"cuda-bindings with green contexts is not there ({error}); install mpsrun[cuda]")
    except MpsrunError as error:
        return NoShares(str(error))
