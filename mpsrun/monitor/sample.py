"""What the monitor hands on: one sample, as data."""

import msgspec


class Tenant(msgspec.Struct, frozen=True, array_like=True):
    """A process of somebody else on the GPU; memory_mib is None where the driver does not say."""

    pid: int
    memory_mib: int | None


class Sample(msgspec.Struct, frozen=True):
    """GPU and host at one moment. None: not supported here, or not permitted.

    at_s: seconds of the monotonic clock, which all processes of a machine share. problem: why there is nothing of the
    GPU, or no GPM. Percentages are those of the whole device: under CUDA MPS no counter is split by client.
    slowed_by: reasons for lower clocks, in words, heat and power only.
    """

    at_s: float
    problem: str = ""
    gpu_percent: int | None = None
    sm_percent: float | None = None
    sm_occupancy_percent: float | None = None
    dram_percent: float | None = None
    tensor_percent: float | None = None
    memory_used_mib: int | None = None
    memory_total_mib: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    temperature_c: int | None = None
    slowed_by: tuple[str, ...] | None = None
    own_mib: int | None = None
    tenants: tuple[Tenant, ...] | None = None
    cpu_percent: float | None = None
    host_available_mib: int | None = None

    @property
    def has_gpu(self) -> bool:
        """Whether anything of the GPU is known."""
        return self.memory_used_mib is not None
