"""Waiting for a 32-bit word of shared memory to change, and waking who waits: Linux futexes (futex(2)) by ctypes."""

from __future__ import annotations

import ctypes
import platform

from mpsrun.errors import MpsrunError

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_WAIT, _WAKE = 0, 1
_EVERYBODY = 1 << 30


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Futex:
    """Waits and wakes between processes; the words are addresses of memory that all of them map."""

    def __init__(self) -> None:
        number = _SYS_FUTEX.get(platform.machine())
        if number is None:
            raise MpsrunError(f"expected one of the machines {sorted(_SYS_FUTEX)}, found {platform.machine()}")
        self._number = ctypes.c_long(number)
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def wait(self, address: int, seen: int, timeout_s: float) -> None:
        """Return once the word is not `seen`, somebody wakes, a signal comes, or `timeout_s` has passed."""
        limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        self._call(address, _WAIT, seen, ctypes.byref(limit))

    def wake(self, address: int) -> None:
        """Wake everybody who waits for this word."""
        self._call(address, _WAKE, _EVERYBODY, None)

    def _call(self, address: int, operation: int, value: int, limit: object) -> None:
        self._syscall(self._number, ctypes.c_void_p(address), operation, ctypes.c_uint32(value), limit, None, 0)
