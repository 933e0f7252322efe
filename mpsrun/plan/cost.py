"""Estimates of what a branch costs, from counts of its ops; measuring replaces them later."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpsrun.graph.regions import Branch


@dataclass(frozen=True)
class Machine:
    """Rates of a machine; `cores_shared`: one op already uses all of its cores."""

    launch_us: float
    flops_per_s: float
    bytes_per_s: float
    crossing_us: float
    cores_shared: bool = False


# Measured on an H200 with eager PyTorch: an op costs 85 to 95 us of one CPU thread, forward and backward together
# (GoogLeNet batch 8, transformer towers batch 4), and a crossing, which is fork, join and both of their backwards, some
# 640 us of the lead (benchmarks/h200.json). The rates are what training reaches there, not its peaks.
MACHINES = {
    "cuda": Machine(launch_us=30.0, flops_per_s=100e12, bytes_per_s=1.5e12, crossing_us=640.0),
    "cpu": Machine(launch_us=5.0, flops_per_s=100e9, bytes_per_s=10e9, crossing_us=500.0, cores_shared=True),
}

# Backward does about twice the work of forward.
FORWARD_AND_BACKWARD = 3


def branch_us(branch: Branch, machine: Machine) -> float:
    """Microseconds of forward and backward: the slowest of launching, computing and moving bytes."""
    launch_us = branch.kernels * machine.launch_us
    compute_us = branch.flops / machine.flops_per_s * 1e6
    memory_us = branch.bytes / machine.bytes_per_s * 1e6
    return FORWARD_AND_BACKWARD * max(launch_us, compute_us, memory_us)


def crossing_us(branches: Sequence[Branch], machine: Machine) -> float:
    """Microseconds that handing branches to workers costs: signals, and bytes there and back."""
    if not branches:
        return 0.0
    crossed_bytes = sum(branch.bytes_in + branch.bytes_out for branch in branches)
    # Written and read once each, in forward and as gradients.
    return machine.crossing_us + 4 * crossed_bytes / machine.bytes_per_s * 1e6
