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


# A kernel launched by eager PyTorch takes some 10 us of one CPU thread; rates are what training reaches on an
# H100, not its peaks. A crossing is fork, join and both of their backwards.
MACHINES = {
    "cuda": Machine(launch_us=10.0, flops_per_s=100e12, bytes_per_s=1.5e12, crossing_us=300.0),
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
