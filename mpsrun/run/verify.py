"""Computes the first calls on lanes as plain PyTorch, too, and stops the script where the two differ."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from mpsrun import config, log
from mpsrun.graph.effects import Effects
from mpsrun.run.deviation import Deviation, Tolerance, compare, is_finite, tolerance
from mpsrun.run.gates import Gates
from mpsrun.run.plainrun import PlainRun, generators

EXIT_STATUS = 4
MOST_ROWS = 20

_all: list[Verification] = []
_said = False  # anything about what was compared


class Verification:
    """The first `steps` calls of one graph under each of its plans."""

    def __init__(self, plain: PlainRun, steps: int) -> None:
        self.steps = steps
        self._plain = plain
        self._calls = self._passes = 0  # forward and backward passes that were compared and not told yet
        self._worst: Deviation | None = None
        self._awaited: weakref.WeakSet[Gates] = weakref.WeakSet()
        self._due = False
        _all.append(self)

    @classmethod
    def of(cls, gm: fx.GraphModule, effects: Effects, device: str) -> Verification | None:
        """As many calls of this graph as `--verify` says; None where it cannot be run twice."""
        plain = PlainRun(gm, effects, device)
        if plain.refusal is None:
            return cls(plain, config.current().verify)
        log.detail(f"not verified: a network in which {plain.refusal}")
        return None

    def call(self, lanes: Callable[..., Any], args: tuple[Any, ...], number: int) -> Any:
        """Run the lanes, then the plain graph; returns what the lanes gave. Raises `SystemExit` where they differ.

        number: which call under this plan it is, from 1.
        """
        step = f"step {number} of {self.steps}"
        allowance = tolerance(self._plain.dtypes, self._plain.device)
        gates = Gates(functools.partial(self._judge, step, allowance))
        plain_args, start = self._plain.copy(args), generators()
        watched = self._plain.differentiable(args)
        entered = gates.enter(args, watched)
        result = lanes(*entered)
        drawn = generators()
        plain_outputs, plain_drawn = self._plain.run(plain_args, start)
        originals = {id(alias): arg for alias, arg in zip(entered, args, strict=True)}
        outputs = [originals.get(id(output), output) for output in result]
        found = compare("random generator", _pairs(drawn, drawn, plain_drawn), allowance)
        found += self._compare(outputs, plain_outputs, args, plain_args, allowance)
        self._calls += 1
        self._take(found, f"outputs and buffers of {step}")
        if watched and not _any_overlap(outputs):
            outputs = gates.leave(outputs, plain_outputs, {i: plain_args[i] for i in watched})
            self._awaited.add(gates)
        self._due = self._due or number == self.steps
        self.settle()
        return type(result)(outputs)

    def settle(self) -> None:
        """Say what was found once the last call is through, and all backward passes that will come."""
        if self._due and all(gates.is_over for gates in self._awaited):
            self.say()

    def say(self) -> None:
        """One line for what was compared since the last one, if anything."""
        global _said
        if self._calls:
            _said = True
            steps = f"{self._calls} step{'s' * (self._calls > 1)} of a network"
            log.say(f"verified {steps}{'' if self._passes else ', without gradients'}: {_told(self._worst)}")
        self._calls = self._passes = 0
        self._worst, self._due = None, False

    def _compare(
        self,
        outputs: Sequence[Any],
        plain_outputs: Sequence[Any],
        args: Sequence[Any],
        plain_args: Sequence[Any],
        allowance: Tolerance,
    ) -> list[Deviation]:
        """Outputs, whether they have gradients, and the memory that the graph writes."""
        plain = self._plain
        found = compare("output", _pairs(range(len(outputs)), outputs, plain_outputs), allowance)
        needs = [(f"{j} requires_grad", _needs(outputs[j]), _needs(plain_outputs[j])) for j in range(len(outputs))]
        found += compare("output", needs, allowance)
        for kind in dict.fromkeys(plain.kinds):
            written = [i for i in plain.written if plain.kinds[i] == kind]
            found += compare(kind, [(plain.names[i], args[i], plain_args[i]) for i in written], allowance)
        return found

    def _judge(self, step: str, allowance: Tolerance, gradients: Mapping[int, tuple[Any, Any]]) -> None:
        self._passes += 1
        if allowance.overflows and _overflow(list(gradients.values())):
            log.detail(f"not verified: gradients of {step}, which overflow on both sides")
        else:
            pairs = [(self._plain.names[i], found, wanted) for i, (found, wanted) in gradients.items()]
            self._take(compare("gradient", pairs, allowance), f"gradients of {step}")
        self.settle()

    def _take(self, found: Sequence[Deviation], what: str) -> None:
        """Note deviations; stop the script where one is too large."""
        worst = max(found, key=lambda deviation: deviation.size, default=None)
        if worst is not None and (self._worst is None or worst.size > self._worst.size):
            self._worst = worst
        if any(deviation.is_excess for deviation in found):
            _stop(found, what)
        log.detail(f"verified {what}: {_told(worst)}")


def say_rest() -> None:
    """At the end of the script: what has not been said yet, or that there was nothing to verify."""
    for verification in _all:
        verification.say()
    if not _said:
        log.say(f"nothing of a compiled network ran on lanes, so nothing was verified; {_advice()}")


def _advice() -> str:
    if config.current().lanes == "auto":
        return "--lanes workers forces every legal region onto them"
    return "--verbose says why not (sets of Branches that are chosen with `active` are never compared)"


def _stop(found: Sequence[Deviation], what: str) -> None:
    global _said
    _said = True
    _all.clear()  # what agreed so far is of no interest now
    _print_table(sorted(found, key=lambda deviation: deviation.size, reverse=True), what)
    log.say(
        f"expected lanes to give what plain PyTorch gives, found other {what}: "
        "run the script with --lanes serial, and please report the table above"
    )
    raise SystemExit(EXIT_STATUS)


def _print_table(found: Sequence[Deviation], what: str) -> None:
    """Write the deviations that are too large to stderr, the largest first."""
    excess = [deviation for deviation in found if deviation.is_excess]
    caption = f"and {len(excess) - MOST_ROWS} more" if len(excess) > MOST_ROWS else None
    table = Table(title=f"{what}: lanes and plain PyTorch differ", caption=caption)
    for name in ("tensor", "kind", "shape", "deviation", "allowed"):
        table.add_column(name, overflow="fold")
    for deviation in excess[:MOST_ROWS]:
        size = deviation.note or f"{deviation.size:.1e}"
        table.add_row(deviation.name, deviation.kind, deviation.shape, size, f"{deviation.allowed:g}")
    Console(file=sys.__stderr__, stderr=True).print(table)


def _told(worst: Deviation | None) -> str:
    if worst is None or not worst.size:
        return "no deviation"
    return f"largest deviation {worst.size:.1e} ({worst.label})"


def _pairs(keys: Any, found: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    return [(str(key), found[key], wanted[key]) for key in keys]


def _needs(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _overflow(gradients: Sequence[tuple[Any, Any]]) -> bool:
    """Whether both sides have an infinity or NaN somewhere: such a step is skipped by the script's GradScaler."""
    sides = list(zip(*gradients, strict=True))
    return bool(sides) and not any(all(map(is_finite, side)) for side in sides)


def _any_overlap(outputs: Sequence[Any]) -> bool:
    """Whether a write to one of the differentiable outputs would change another, and so the history of its gradient."""
    tensors = [output for output in outputs if _needs(output)]
    found = any(torch._C._overlaps(a, b) and _share_entries(a, b) for a, b in combinations(tensors, 2))
    if found:
        log.detail("not verified: gradients of outputs that share memory")
    return found


def _share_entries(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on one storage, as the parts that `chunk` gives, really meet."""
    if a.dtype != b.dtype:
        return True
    places = torch.arange(a.untyped_storage().nbytes() // a.itemsize, device=a.device)
    mine, others = (places.as_strided(x.shape, x.stride(), x.storage_offset()).flatten() for x in (a, b))
    return bool(torch.isin(mine, others).any())
