"""Changing habits for minutes, and what lead and workers hold at the start, in the middle and at the end."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Mapping

import psutil
import torch

from benchmarks.habits import HABITS, Forking, Trainee, parametrised_or_not
from mpsrun.run import report, session
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.in_place import compile_in_place

NETWORKS = 8  # that take turns: once each of them was there, Dynamo, which never forgets all of a graph, has no new one
HABITS_A_NETWORK = 12
REPEATABLE = [
    habit for habit in HABITS if habit is not parametrised_or_not
]  # which makes a class, so a graph, each time
WARM_UP = 0.25  # part of the time after which "start" is
WINDOW = 8  # networks over which the least figure counts: what is between two collections of garbage is no growth
GROWTH = 0.01

Figures = dict[str, float]


def soak(minutes: float, seed: int, device: str) -> list[tuple[str, Figures]]:
    """Train network after network, dropping each; the figures at the start, in the middle and at the end."""
    begin, length_s = time.monotonic(), minutes * 60
    seen: list[Figures] = []
    networks = 0
    while (now_s := time.monotonic() - begin) < length_s:
        train_one(random.Random(seed + networks % NETWORKS), device)
        networks += 1
        if now_s >= WARM_UP * length_s and networks > NETWORKS:
            seen.append(held())
    if len(seen) < 3 * WINDOW:
        raise ValueError(f"expected at least {3 * WINDOW} networks after the warm-up, found {len(seen)}; take longer")
    print(f"{networks} networks with {HABITS_A_NETWORK} habits each in {minutes:g} minutes", flush=True)
    middle = len(seen) // 2
    return [
        ("start", least(seen[:WINDOW])),
        ("middle", least(seen[middle : middle + WINDOW])),
        ("end", least(seen[-WINDOW:])),
    ]


def train_one(rng: random.Random, device: str) -> None:
    """A network, some habits, and then nothing of it but its graphs."""
    torch.manual_seed(rng.randrange(1000))
    t = Trainee(Forking(rng.randint(2, 4)).to(device, torch.float64))
    compile_in_place(t.model)
    for _ in range(HABITS_A_NETWORK):
        rng.choice(REPEATABLE)(t, rng.randrange(1000))


def held() -> Figures:
    """What this process and its workers hold now."""
    owner = session.current()
    if owner is None:
        raise RuntimeError(f"expected workers, found none: {session.why_none()}")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no growth
    tidy(owner)
    counts = owner.counts()
    figures: Figures = {"lead RSS": rss_mib(None)}
    for link in owner.links:
        if link.lost is not None:
            raise RuntimeError(f"expected all workers at the end, lost {link.index}: {link.lost}")
        figures |= {
            f"worker {link.index} RSS": rss_mib(link.pid),
            f"worker {link.index} jobs": counts[link.index].jobs,
            f"worker {link.index} forwards kept": counts[link.index].kept,
        }
    figures["graphs"] = len(report.graphs)
    figures["slots in use"] = owner._arena.in_use - len(owner._retired)
    figures["chunks"] = len(owner._arena.chunks)
    figures["exported handles"] = len(owner.device.exported())
    return figures


def tidy(owner: Coordinator) -> None:
    """Have the workers told what they need not keep, as the next step would."""
    with owner.lock:
        owner._tidy()


def rss_mib(pid: int | None) -> float:
    return round(psutil.Process(pid).memory_info().rss / 2**20, 1)


def least(window: list[Figures]) -> Figures:
    return {name: min(figures[name] for figures in window) for name in window[0]}


def grown(start: Mapping[str, float], end: Mapping[str, float]) -> list[str]:
    """What is more than 1 % above where it was."""
    return [
        f"{name}: {start[name]:g} -> {value:g}" for name, value in end.items() if value > start[name] * (1 + GROWTH)
    ]
