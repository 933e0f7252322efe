"""A pynvml that needs no GPU: answers what its fields say, and refuses as the real one does."""

import types
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_GPU_IS_LOST = 15


class NVMLError(Exception):
    """An error with its number, as in pynvml."""

    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 4: "Insufficient Permissions", 15: "GPU is lost"}.get(value, str(value)))
        self.value = value


@dataclass
class FakeNvml:
    """One GPU. denied: functions that are not permitted; unsupported: functions that this GPU lacks."""

    uuid: str = "GPU-11111111-2222-3333-4444-555555555555"
    fails: bool = False
    lost: bool = False
    used_mib: int = 4000
    total_mib: int = 80_000
    processes: dict[int, int | None] = field(default_factory=dict)
    mps_processes: dict[int, int | None] = field(default_factory=dict)
    reasons: int = 0
    compute_mode: int = 0
    mig: int = 0
    has_gpm: bool = True
    gpm: dict[int, float] = field(default_factory=lambda: {2: 55.0, 3: 30.0, 5: 12.5, 10: 40.0})
    gpm_stutters: bool = False
    denied: set[str] = field(default_factory=set)
    unsupported: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    open_sessions: int = 0
    allocated: int = 0

    NVMLError = NVMLError
    NVML_ERROR_GPU_IS_LOST = NVML_ERROR_GPU_IS_LOST
    NVML_ERROR_NOT_SUPPORTED = NVML_ERROR_NOT_SUPPORTED
    NVML_ERROR_NO_PERMISSION = NVML_ERROR_NO_PERMISSION
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_GPM_METRICS_GET_VERSION = 1

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return super().__getattribute__(name)
        self.calls.append(name)
        if name in self.unsupported:
            raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
        if name in self.denied:
            raise NVMLError(NVML_ERROR_NO_PERMISSION)
        if self.lost and name.startswith("nvmlDevice"):
            raise NVMLError(NVML_ERROR_GPU_IS_LOST)
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:  # noqa: N802 - as in pynvml, like all below
        if self.fails:
            raise NVMLError(9)
        self.open_sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, _index: int) -> str:  # noqa: N802
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != self.uuid:
            raise NVMLError(6)
        return "handle"

    def nvmlDeviceGetUUID(self, _handle: str) -> str:  # noqa: N802
        return self.uuid

    def nvmlDeviceGetName(self, _handle: str) -> str:  # noqa: N802
        return "NVIDIA Fake"

    def nvmlDeviceGetComputeMode(self, _handle: str) -> int:  # noqa: N802
        return self.compute_mode

    def nvmlDeviceGetMigMode(self, _handle: str) -> tuple[int, int]:  # noqa: N802
        return self.mig, self.mig

    def nvmlDeviceGetMemoryInfo(self, _handle: str) -> Any:  # noqa: N802
        return types.SimpleNamespace(used=self.used_mib * MIB, total=self.total_mib * MIB)

    def nvmlDeviceGetCurrentClocksEventReasons(self, _handle: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetPowerUsage(self, _handle: str) -> int:  # noqa: N802
        return 350_500

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetUtilizationRates(self, _handle: str) -> Any:  # noqa: N802
        return types.SimpleNamespace(gpu=87, memory=20)

    def nvmlDeviceGetClockInfo(self, _handle: str, _kind: int) -> int:  # noqa: N802
        return 1755

    def nvmlDeviceGetMaxClockInfo(self, _handle: str, _kind: int) -> int:  # noqa: N802
        return 1980

    def nvmlDeviceGetTemperature(self, _handle: str, _sensor: int) -> int:  # noqa: N802
        return 55

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:  # noqa: N802
        return _listed(self.processes)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, _handle: str) -> list[Any]:  # noqa: N802
        return _listed(self.mps_processes)

    def nvmlGpmQueryDeviceSupport(self, _handle: str) -> Any:  # noqa: N802
        return types.SimpleNamespace(isSupportedDevice=int(self.has_gpm))

    def nvmlGpmSampleAlloc(self) -> object:  # noqa: N802
        self.allocated += 1
        return object()

    def nvmlGpmSampleFree(self, _sample: object) -> None:  # noqa: N802
        self.allocated -= 1

    def nvmlGpmSampleGet(self, _handle: str, _sample: object) -> None:  # noqa: N802
        return

    def nvmlGpmMetricsGet(self, query: Any) -> None:  # noqa: N802
        if self.gpm_stutters and len(self.calls) % 2:
            raise NVMLError(999)
        assert query.sample1 is not query.sample2
        for place in range(query.numMetrics):
            metric = query.metrics[place]
            metric.nvmlReturn = 0 if metric.metricId in self.gpm else NVML_ERROR_NOT_SUPPORTED
            metric.value = self.gpm.get(metric.metricId, 0.0)

    def c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802
        metrics = [types.SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(8)]
        return types.SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=metrics)


def _listed(processes: dict[int, int | None]) -> list[Any]:
    return [
        types.SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB)
        for pid, mib in processes.items()
    ]
