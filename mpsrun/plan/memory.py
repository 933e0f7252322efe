"""What a plan needs of the device's memory beyond what the script needs anyway."""

from collections.abc import Collection, Iterable, Sequence

from mpsrun.graph.regions import Branch, Region
from mpsrun.plan.candidates import Candidate
from mpsrun.plan.lanes import LEAD, is_worker
from mpsrun.plan.plan import Assignment, Plan
from mpsrun.plan.shares import places_of

# A CUDA context of a worker with its first kernels; bare it takes 612 MiB (an H200, benchmarks/h200-memory.json).
CONTEXT_BYTES = 700 * 2**20
# A green context, which a share of the multiprocessors takes; measured on an H100.
SHARE_BYTES = 6 * 2**20
# A slot for a forward and one for its backward hold each tensor that crosses.
SLOTS = 2
# Of the bytes that ops move about one half is written, and may be kept for the backward.
KEPT_OF_MOVED = 0.5


def memory_needed_bytes(plan: Plan, regions: Sequence[Region], ready_workers: Collection[int] = ()) -> int:
    """Contexts of workers without one and of shares, slots of the arena, activations in pools but the lead's own.

    ready_workers: the workers whose context exists, and is no longer part of what is free.
    """
    away = [*_away(plan, regions)]
    contexts = CONTEXT_BYTES * len(plan.workers - set(ready_workers))
    arena = SLOTS * sum(branch.bytes_in + branch.bytes_out for branch, lane in away if is_worker(lane))
    shares = {place for c in plan.regions.values() if isinstance(c, Assignment) for place in places_of(c).values()}
    contexts += SHARE_BYTES * len(shares)
    return contexts + arena + int(KEPT_OF_MOVED * sum(branch.bytes for branch, _ in away))


def too_large(
    plan: Plan, regions: Sequence[Region], free_bytes: int, ready_workers: Collection[int] = ()
) -> str | None:
    """Why there is no memory for `plan`, or None where there is."""
    needed = memory_needed_bytes(plan, regions, ready_workers)
    if needed <= free_bytes:
        return None
    return f"needs {needed / 2**20:.0f} MiB of the device's memory, {max(0, free_bytes) / 2**20:.0f} MiB are free"


def workspace_bytes(plan: Plan, regions: Sequence[Region], free_bytes: int) -> int:
    """What an algorithm may take for itself: of what the plan leaves free an equal part for each lane."""
    lanes = 1 + max((len({*c.lanes}) for c in plan.regions.values() if isinstance(c, Assignment)), default=0)
    return max(0, free_bytes - memory_needed_bytes(plan, regions)) // lanes


def affordable(
    candidates: Iterable[Candidate], regions: Sequence[Region], free_bytes: int, ready_workers: Collection[int] = ()
) -> tuple[Candidate, ...]:
    """The candidates for which there is memory; the serial one needs none."""
    return tuple(
        candidate
        for candidate in candidates
        if candidate.plan.is_serial or too_large(candidate.plan, regions, free_bytes, ready_workers) is None
    )


def _away(plan: Plan, regions: Sequence[Region]) -> Iterable[tuple[Branch, int]]:
    for region in regions:
        choice = plan.regions.get(region.index)
        if isinstance(choice, Assignment):
            yield from ((b, lane) for b, lane in zip(region.branches, choice.lanes, strict=True) if lane != LEAD)
