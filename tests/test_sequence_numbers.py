"""Sequence numbers have 32 bits and are shared by all workers: one that was idle for long must not seem to be ahead."""

import copy

import pool
import torch
from networks import Three
from transparency import TOLERANCE, Trained, assert_same, on_lanes, trained

from mpsrun.run.coordinator import Coordinator
from mpsrun.run.pool import LEVEL_EVERY


def pair(workers: int) -> tuple[Trained, Trained]:
    plain = Three().double()
    return trained(plain), trained(on_lanes(copy.deepcopy(plain), workers))


def check(sides: tuple[Trained, Trained], seed: int) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    wanted, found = (side.step((x,), seed) for side in sides)
    assert_same(found, wanted, f"seed {seed}", TOLERANCE)


def test_an_idle_worker_is_not_taken_to_be_ahead(workers: Coordinator) -> None:
    alone, both = pair(1), pair(2)
    for seed in range(2):
        check(alone, seed)
        check(both, seed)
    for turn in range(1, 17):  # twice around
        workers.pool.sequence = (turn * LEVEL_EVERY - 2) & 0xFFFFFFFF
        for seed in range(2):
            check(alone, seed)
        if turn % 5 == 0:
            check(both, turn)
        pool.settle(workers)  # the watching thread looks more often than every 2**31 submissions
    assert workers.pool.sequence < LEVEL_EVERY
