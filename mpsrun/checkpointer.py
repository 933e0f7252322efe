"""Checkpoints for scripts that have none: after a restart the loop goes on where it was, with the same numbers.

    checkpointer = mpsrun.Checkpointer("checkpoints", model, optimizer)
    for epoch in checkpointer.epochs(10):
        for inputs, targets in checkpointer.batches(loader):
            ...

A file is written beside its place, synced to the disk, and renamed; its name has a digest of its content. So a file is
complete and unharmed, or known not to be, and then the one before is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from mpsrun import log
from mpsrun.errors import UsageError

Item = TypeVar("Item")
State = dict[str, Any]
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class Stateful(Protocol):
    """What has a state to save: modules, optimizers, schedulers, gradient scalers."""

    def state_dict(self) -> Any:
        """Return the state, as tensors and plain data."""

    def load_state_dict(self, state: Any) -> Any:
        """Take over a state."""


class Checkpointer:
    """Saves after every `every` steps into the directory `path`, and keeps the last `keep` checkpoints.

    parts: everything with a `state_dict` that changes in training, always in the same order. The newest checkpoint is
    loaded at once; `step` says how many steps were done before, 0 where there is none. The random generators of
    Python, NumPy (where it is in use), and torch are restored, and so is the order of the data: `batches` runs through
    those of the interrupted epoch without handing them out. For one training process.
    """

    def __init__(self, path: str | os.PathLike[str], *parts: Stateful, keep: int = 3, every: int = 1) -> None:
        if keep < 1 or every < 1 or not parts:
            raise UsageError(f"expected parts, keep and every from 1 on, found {len(parts)}, {keep} and {every}")
        self.step = 0
        self._path = Path(path)
        self._parts = parts
        self._keep = keep
        self._every = every
        self._epoch = 0
        self._batch = 0  # of this epoch
        self._epoch_rng: State | None = None  # as the data loader of this epoch found it
        self._rng: State | None = None  # to be restored when the loop has come to where it was
        self._generators: list[torch.Generator] = []  # the data loader's own
        self._is_proven = False
        self._written = 0  # the step of the last checkpoint
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"expected a directory for checkpoints at {self._path}, found: {error}") from error
        for left in self._path.glob("*.part"):  # of a process that was ended while it wrote
            left.unlink(missing_ok=True)
        self._load()

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the epochs still to be done, of `count` in all; then write a last checkpoint."""
        self._tell_if_done(self._epoch >= count)
        while self._epoch < count:
            epoch = self._epoch
            if not self._batch:
                self._restore_rng()
            yield epoch
            if self._epoch == epoch:  # nothing was read through `batches`
                self._end_epoch()
        self._finish()

    def batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches of one epoch that are still to be done; a step is done when the next one is asked for.

        Use it once an epoch.
        """
        self._generators = _generators(loader)
        if self._epoch_rng is None:
            self._restore_rng()
            self._epoch_rng = _random_state(self._generators)
        else:
            _set_random_state(self._epoch_rng, self._generators)
        batches = iter(loader)
        for _ in range(
            self._batch
        ):  # a loader's workers draw their random numbers in their own order, so from the start
            next(batches, None)
        self._restore_rng()
        for batch in batches:
            yield batch
            self._end_step()
        self._end_epoch()

    def steps(self, count: int) -> Iterator[int]:
        """Yield the numbers of the steps that are still to be done, of `count` in all: for loops without epochs."""
        self._tell_if_done(self.step >= count)
        self._restore_rng()
        while self.step < count:
            yield self.step
            self._end_step()
        self._finish()

    def save(self) -> None:
        """Write a checkpoint now. Where that fails, one line says so, and the older ones stay."""
        part = self._path / f"{os.getpid()}.part"
        try:
            digest = _write(part, self._state())
            self._prove(part)
            part.rename(self._path / f"step-{self.step:010}-{digest}.pt")
            _sync(self._path)
        except (OSError, RuntimeError) as error:  # a full disk, as torch tells it; the run itself is sound
            log.say(f"expected to write a checkpoint of step {self.step} to {self._path}, found: {error}; going on")
            part.unlink(missing_ok=True)
            return
        self._written = self.step
        for old, _ in self._found()[self._keep :]:
            old.unlink(missing_ok=True)

    def _prove(self, part: Path) -> None:
        """Read the first checkpoint back, so that a part which could not be loaded is told now and not when needed."""
        if not self._is_proven:
            try:
                torch.load(part, map_location="cpu", weights_only=True)
            except Exception as error:
                part.unlink(missing_ok=True)
                raise UsageError(
                    f"expected parts whose state torch.load(weights_only=True) can read, found: {error}; "
                    "leave such a part out, or allow its type with torch.serialization.add_safe_globals"
                ) from error
            self._is_proven = True

    def _state(self) -> State:
        return {
            "step": self.step,
            "epoch": self._epoch,
            "batch": self._batch,
            "epoch_rng": self._epoch_rng,
            "rng": _random_state(self._generators),
            "parts": [part.state_dict() for part in self._parts],
        }

    def _end_step(self) -> None:
        self.step += 1
        self._batch += 1
        if self.step % self._every == 0:
            self.save()

    def _finish(self) -> None:
        """Keep what was done since the last checkpoint."""
        if self.step != self._written:
            self.save()

    def _tell_if_done(self, is_done: bool) -> None:
        if is_done and self.step:
            log.say(f"all of this training was done before, in {self.step} steps; nothing is left to do")

    def _end_epoch(self) -> None:
        self._epoch += 1
        self._batch = 0
        self._epoch_rng = None

    def _restore_rng(self) -> None:
        if self._rng is not None:
            _set_random_state(self._rng, self._generators)
            self._rng = None

    def _found(self) -> list[tuple[Path, str]]:
        """Return the checkpoints and the digests that they should have, the newest first."""
        named = [(entry, match) for entry in self._path.iterdir() if (match := _NAME.fullmatch(entry.name))]
        named.sort(key=lambda pair: int(pair[1][1]), reverse=True)
        return [(entry, match[2]) for entry, match in named]

    def _load(self) -> None:
        for path, digest in self._found():
            state = _read(path, digest)
            if state is not None:
                self._take(path, state)
                return

    def _take(self, path: Path, state: State) -> None:
        if len(state["parts"]) != len(self._parts):
            raise UsageError(
                f"expected {path} to hold {len(self._parts)} parts, found {len(state['parts'])}; "
                "give Checkpointer what it was given before, or another directory"
            )
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.step, self._epoch, self._batch = state["step"], state["epoch"], state["batch"]
        self._written = self.step
        self._epoch_rng, self._rng = state["epoch_rng"], state["rng"]
        log.say(f"going on from step {self.step}: {path}")


class _Hashing:
    """A file for torch.save, which takes a digest of what goes through it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.digest.update(rest)
        size = len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        return size

    def flush(self) -> None:
        """Nothing is kept back."""


def _write(path: Path, state: State) -> str:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        file = _Hashing(descriptor)
        torch.save(state, file)  # type: ignore[arg-type]  # it needs no more of a file
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return file.digest.hexdigest()[:16]


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, digest: str) -> State | None:
    """Return what is in a checkpoint; None, with a line, where it is not what was written."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            if found == digest:
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
            error = f"a digest of {found}"
    except OSError as reason:
        error = str(reason)
    log.say(f"expected a whole checkpoint in {path}, found {error}; taking the one before")
    return None


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators of a data loader's own, which decide about its order."""
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _random_state(generators: list[torch.Generator]) -> State:
    state: State = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["generators"] = [generator.get_state() for generator in generators]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return state


def _set_random_state(state: State, generators: list[torch.Generator]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    for generator, saved in zip(generators, state["generators"], strict=False):
        generator.set_state(saved)
    if "cuda" in state and torch.cuda.is_available():
        with contextlib.suppress(IndexError):  # a machine with fewer GPUs
            torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy as np

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
