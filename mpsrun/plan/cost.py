"""What branches cost: measured where they were, else estimated from counts of their ops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpsrun.graph.regions import Branch, Region


@dataclass(frozen=True)
class Machine:
    """Rates of a machine; `cores_shared`: one op already uses all of its cores.

    replay_us: what a kernel takes at least in a CUDA graph. replay_crossing_us: a crossing between CUDA graphs.
    """

    launch_us: float
    flops_per_s: float
    bytes_per_s: float
    crossing_us: float
    cores_shared: bool = False
    replay_us: float = 0.0
    replay_crossing_us: float = 0.0


# With eager PyTorch an op costs 85 to 95 us of one CPU thread, forward and backward together: GoogLeNet batch 8 and
# transformer towers batch 4 on an H200 (benchmarks/h200.json). A crossing, which is fork, join and both of their
# backwards, takes some 550 us of the lead on an H100 (benchmarks/h100.json). The rates are what training reaches there,
# not its peaks. A signal between CUDA graphs of two processes under CUDA MPS takes 5.3 us there, from the write until
# the other graph goes on; a crossing has four of them.
MACHINES = {
    "cuda": Machine(
        launch_us=30.0,
        flops_per_s=100e12,
        bytes_per_s=1.5e12,
        crossing_us=550.0,
        replay_us=2.0,
        replay_crossing_us=21.0,
    ),
    "cpu": Machine(launch_us=5.0, flops_per_s=100e9, bytes_per_s=10e9, crossing_us=500.0, cores_shared=True),
}

# A side stream costs the lead an event and a wait at the fork and at the join, in forward and in backward.
STREAM_US = 20.0

# Backward does about twice the work of forward.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Costs:
    """Microseconds of forward and backward of every branch.

    measured_us: by region index, the time alone of each branch; regions that are not in it are estimated. replayed:
    nothing is launched by a thread.
    """

    machine: Machine
    measured_us: Mapping[int, Sequence[float]] = field(default_factory=dict)
    replayed: bool = False

    def captured(self) -> "Costs":
        """The same work without launching it op by op, which is what was measured."""
        machine = self.machine
        replayed = replace(machine, launch_us=machine.replay_us, crossing_us=machine.replay_crossing_us)
        return Costs(replayed, replayed=True)

    @property
    def stream_us(self) -> float:
        """What each side stream of a region costs."""
        return 0.0 if self.replayed else STREAM_US

    def branch_us(self, region: Region) -> list[float]:
        """Each branch alone."""
        measured = self.measured_us.get(region.index)
        return [branch_us(branch, self.machine) for branch in region.branches] if measured is None else [*measured]

    def launch_us(self, region: Region) -> list[float]:
        """Of each branch, how long a Python thread is busy with launching it."""
        if self.replayed:
            return [0.0] * len(region.branches)
        return [
            min(whole, FORWARD_AND_BACKWARD * _launch_us(branch, self.machine))
            for branch, whole in zip(region.branches, self.branch_us(region), strict=True)
        ]

    def busy_us(self, region: Region) -> list[float]:
        """Of each branch, the work of the whole device, which nothing else can be computed beside."""
        return [
            min(whole, FORWARD_AND_BACKWARD * _busy_us(branch, self.machine))
            for branch, whole in zip(region.branches, self.branch_us(region), strict=True)
        ]

    def serial_us(self, region: Region) -> float:
        """The region in the lead, one branch after the other."""
        return sum(self.branch_us(region))


def branch_us(branch: Branch, machine: Machine) -> float:
    """Microseconds of forward and backward: the slowest of launching, computing and moving bytes."""
    return FORWARD_AND_BACKWARD * max(_launch_us(branch, machine), _busy_us(branch, machine))


def crossing_us(branches: Sequence[Branch], machine: Machine) -> float:
    """Microseconds that handing branches to workers costs: signals, and bytes there and back."""
    if not branches:
        return 0.0
    crossed_bytes = sum(branch.bytes_in + branch.bytes_out for branch in branches)
    # Written and read once each, in forward and as gradients.
    return machine.crossing_us + 4 * crossed_bytes / machine.bytes_per_s * 1e6


def _launch_us(branch: Branch, machine: Machine) -> float:
    return branch.kernels * machine.launch_us


def _busy_us(branch: Branch, machine: Machine) -> float:
    return max(branch.flops / machine.flops_per_s, branch.bytes / machine.bytes_per_s) * 1e6
