"""Regions, plans and candidates for the tests of plans."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mpsrun.graph.regions import Branch, Region
from mpsrun.plan.candidates import Candidate
from mpsrun.plan.cost import Machine
from mpsrun.plan.lanes import LEAD, WHOLE
from mpsrun.plan.plan import Assignment, Declined, Plan, some_shares

# A busy machine is slow at times; that says nothing about plans.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# An op costs 30 us forward and backward.
GPU = Machine(launch_us=10.0, flops_per_s=1e12, bytes_per_s=1e12, crossing_us=300.0, replay_us=1.0)


def region(
    *kernels: int,
    pinned: tuple[int, ...] = (),
    crossing_bytes: int = 0,
    index: int = 0,
    parent: tuple[int, int] | None = None,
    flops: int = 0,
    moved_bytes: int = 0,
) -> Region:
    branches = tuple(
        Branch(
            nodes=(),
            pinned="because" if at in pinned else None,
            kernels=count,
            flops=flops,
            bytes=moved_bytes,
            bytes_in=crossing_bytes,
            bytes_out=crossing_bytes,
        )
        for at, count in enumerate(kernels)
    )
    return Region(index, branches, parent)


def contenders(*workers: tuple[int, ...]) -> list[Candidate]:
    """Serial, and one candidate for each set of workers; a number below 0 stands for a side stream."""
    made = [Candidate("serial", Plan({0: Declined("serial")}), 1.0)]
    made += [Candidate(f"plan {i}", Plan({0: Assignment((0, *lanes))}), 1.0) for i, lanes in enumerate(workers, 1)]
    return made


LINES = st.text(min_size=1).map(lambda text: " ".join(text.split())).filter(bool)


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    lanes = tuple(draw(st.lists(st.integers(-(10**9) + 1, 10**9 - 1), min_size=1, max_size=8)))
    shares = st.sampled_from([WHOLE, 1, 25, 99])
    return Assignment(lanes, some_shares(draw(shares) if lane != LEAD else WHOLE for lane in lanes))


CHOICES = st.one_of(assignments(), LINES.map(Declined))
PLANS = st.builds(Plan, st.dictionaries(st.integers(0, 10**9 - 1), CHOICES, max_size=5), st.booleans(), st.booleans())
