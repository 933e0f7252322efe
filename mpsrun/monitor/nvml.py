"""NVML through nvidia-ml-py; the only importer of pynvml. What is missing, not permitted or not supported is None.

Functions and units: https://docs.nvidia.com/deploy/nvml-api. GPM (Hopper and later) tells how busy SMs, tensor cores
and memory were between two of its own samples.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mpsrun.errors import MpsrunError

MIB = 1 << 20
_GPM = {"sm_percent": 2, "sm_occupancy_percent": 3, "tensor_percent": 5, "dram_percent": 10}
# NVML, "Clocks Event Reasons"
_SLOWED_BY = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
_COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}
_GONE = ("GPU_IS_LOST", "RESET_REQUIRED", "UNINITIALIZED")
_NEVER = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND")
_MOST_FAILURES = 10  # of GPM in a row, after which it is not asked any more


class Unavailable(MpsrunError):
    """There is no NVML, or it refuses; the text is the reason in words."""


@dataclass(frozen=True)
class Mode:
    """How a GPU may be used: its compute mode in words, and whether it is cut into instances."""

    uuid: str
    name: str
    compute: str
    is_mig: bool


@contextlib.contextmanager
def session() -> Iterator[Any]:
    """Open NVML, and yield pynvml. Raises Unavailable."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        raise Unavailable("nvidia-ml-py is not installed (pip install nvidia-ml-py)") from None
    except Exception as error:  # noqa: BLE001 - NVMLError, and what a library of another version makes of it
        raise Unavailable(f"NVML: {error}") from None
    try:
        yield pynvml
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def modes() -> list[Mode]:
    """Return the GPUs of this machine; none without NVML."""
    try:
        with session() as pynvml:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            return [_mode(pynvml, handle) for handle in handles]
    except Exception:  # noqa: BLE001 - nothing is known
        return []


def driver_version() -> str:
    """Return the version of the driver. Raises Unavailable."""
    with session() as pynvml:
        return str(pynvml.nvmlSystemGetDriverVersion())


def memory_by_pid() -> dict[int, int]:
    """Return the memory of each process on any GPU in MiB, as far as the driver tells."""
    found: dict[int, int] = {}
    try:
        with session() as pynvml:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                for pid, mib in _processes(pynvml, handle).items():
                    found[pid] = found.get(pid, 0) + (mib or 0)
    except Exception:  # noqa: BLE001 - nothing is known
        return {}
    return found


class Gpu:
    """One GPU, read again and again within a session."""

    def __init__(self, pynvml: Any, uuid: str) -> None:
        self._nvml = pynvml
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML knows no GPU {uuid}: {error}") from None
        # It does not change, and takes longer to tell than all the rest together.
        self._max_clock_mhz = self._ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
        self._gpm_problem = ""
        self._gpm_samples: list[Any] = []
        self._gpm_query: Any = None
        self._gpm_failures = 0
        self._open_gpm()

    @property
    def problem(self) -> str:
        """Why there is no GPM; empty where there is."""
        return self._gpm_problem

    def read(self) -> dict[str, Any]:
        """Return the fields of a Sample that come from the GPU, processes apart. Raises Unavailable if it is lost."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if reasons is None:  # drivers before 535 know it by another name
            reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        power_mw = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit_mw = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return {
            "gpu_percent": self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "memory_used_mib": None if memory is None else memory.used // MIB,
            "memory_total_mib": None if memory is None else memory.total // MIB,
            "power_w": None if power_mw is None else power_mw / 1000,
            "power_limit_w": None if limit_mw is None else limit_mw / 1000,
            "sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "sm_clock_max_mhz": self._max_clock_mhz,
            "temperature_c": self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "slowed_by": None if reasons is None else tuple(t for bit, t in _SLOWED_BY.items() if reasons & bit),
            **self._read_gpm(),
        }

    def processes(self) -> dict[int, int | None] | None:
        """Return the memory by pid of all processes on the GPU; None where that is not permitted."""
        return self._ask(lambda: _processes(self._nvml, self._handle))

    def close(self) -> None:
        """Free what GPM has allocated."""
        while self._gpm_samples:
            with contextlib.suppress(Exception):
                self._nvml.nvmlGpmSampleFree(self._gpm_samples.pop())

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError as error:
            if self._is(error, _GONE):
                raise Unavailable(f"the GPU is lost to NVML: {error}") from None
            return None
        except AttributeError:  # a function that this version of the library lacks
            return None

    def _is(self, error: Any, names: Sequence[str]) -> bool:
        return any(getattr(self._nvml, f"NVML_ERROR_{name}", None) == error.value for name in names)

    def _open_gpm(self) -> None:
        nvml = self._nvml
        try:
            if not nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice:
                self._gpm_problem = "this GPU has no GPM"
                return
            self._gpm_samples = [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
            nvml.nvmlGpmSampleGet(self._handle, self._gpm_samples[0])
            query = nvml.c_nvmlGpmMetricsGet_t()
        except (nvml.NVMLError, AttributeError) as error:
            self._gpm_problem = f"no GPM: {error}"
            return
        query.version = nvml.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = len(_GPM)
        for place, metric in enumerate(_GPM.values()):
            query.metrics[place].metricId = metric
        self._gpm_query = query

    def _read_gpm(self) -> dict[str, float]:
        """Return what was between the last two samples of GPM."""
        query = self._gpm_query
        if query is None:
            return {}
        before, now = self._gpm_samples
        try:
            self._nvml.nvmlGpmSampleGet(self._handle, now)
            query.sample1, query.sample2 = before, now
            self._nvml.nvmlGpmMetricsGet(query)
        except self._nvml.NVMLError as error:
            self._gpm_failures += 1
            if self._is(error, _NEVER) or self._gpm_failures >= _MOST_FAILURES:
                self._gpm_problem, self._gpm_query = f"no GPM: {error}", None
            return {}
        self._gpm_failures = 0
        self._gpm_samples = [now, before]
        answers = {name: query.metrics[place] for place, name in enumerate(_GPM)}
        return {name: float(answer.value) for name, answer in answers.items() if not answer.nvmlReturn}


def _mode(pynvml: Any, handle: Any) -> Mode:
    try:
        is_mig = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # it cannot be cut
        is_mig = False
    compute = pynvml.nvmlDeviceGetComputeMode(handle)
    uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    return Mode(str(uuid), str(name), _COMPUTE_MODES.get(compute, f"mode {compute}"), is_mig)


def _processes(pynvml: Any, handle: Any) -> dict[int, int | None]:
    """Clients of CUDA MPS are in one list or in both, by version of the driver."""
    found: dict[int, int | None] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetMPSComputeRunningProcesses):
        try:
            listed = ask(handle)
        except pynvml.NVMLError:
            if found:
                continue
            raise
        for process in listed:
            used = process.usedGpuMemory
            found[process.pid] = (
                max(found.get(process.pid) or 0, used // MIB) if used is not None else found.get(process.pid)
            )
    return found
