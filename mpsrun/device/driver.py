"""The CUDA driver by way of ctypes: for what torch does not offer, and cuda-bindings may lack or take too long for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from mpsrun import log
from mpsrun.errors import in_a_line

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the default stream does not hold it; green contexts have no others


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """Another stream, which nobody else gets and which lives as long as the process.

    Those that torch makes are 32, which it hands out again and again: a stream of the script may be one that something
    is just recorded on. It is one of them, and one line why, where the driver cannot make another.
    """
    raw = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the process's own context current
        try:
            status = driver_function("cuStreamCreate", "pI")(ctypes.addressof(raw), NON_BLOCKING)
        except (OSError, AttributeError) as error:
            return _torchs_stream(device, in_a_line(error))
    if status or raw.value is None:
        return _torchs_stream(device, f"error {status} of the CUDA driver")
    return torch.cuda.ExternalStream(raw.value, device=device)


def _torchs_stream(device: torch.device, reason: str) -> torch.cuda.Stream:
    log.say(f"a lane has a stream that the script may get, too: cuStreamCreate failed ({reason})")
    return torch.cuda.Stream(device)


@functools.cache
def driver_function(name: str, kinds: str) -> Callable[..., int]:
    """A function of the CUDA driver; `kinds` are p (pointer) or I (unsigned) by argument.

    By way of ctypes: cuda-bindings need not be there, and make and check new objects in each call, which takes longer
    than the driver.
    """
    function = ctypes.CDLL("libcuda.so.1")[name]
    function.argtypes = [ctypes.c_void_p if kind == "p" else ctypes.c_uint for kind in kinds]
    return function
