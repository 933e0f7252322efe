"""How far tensors are from those that plain PyTorch computes, and how far rounding may take them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpsrun.run import state as modes

Pair = tuple[str, Any, Any]


@dataclass(frozen=True)
class Tolerance:
    """What may differ: `allowed` is the largest entry of a tensor's difference, relative to the largest of the tensor.

    A tensor counts as no smaller than `floor` times the largest one of its kind, a gradient as `gradient_floor` times:
    some are zero but for rounding, such as that of a bias in front of a batch norm, and what is rounded away there is
    as large as in the others. overflows: large gradients may become infinite.
    """

    allowed: float
    floor: float
    gradient_floor: float
    overflows: bool = False


FLOAT64 = Tolerance(allowed=1e-7, floor=1e-6, gradient_floor=1e-6)
FLOAT32 = Tolerance(allowed=1e-3, floor=1e-2, gradient_floor=2e-2)
TF32 = Tolerance(allowed=1e-2, floor=1e-1, gradient_floor=2e-1)
HALF = Tolerance(allowed=2e-2, floor=1e-1, gradient_floor=1.0, overflows=True)


def tolerance(dtypes: Iterable[torch.dtype], device: str) -> Tolerance:
    """What a computation with these dtypes may lose under the autocast mode and the settings of now."""
    used = set(dtypes)
    if torch.is_autocast_enabled(device):
        used.add(torch.get_autocast_dtype(device))
    floating = [dtype.to_real() for dtype in used if dtype.is_floating_point or dtype.is_complex]
    narrowest = min((dtype.itemsize for dtype in floating), default=8)
    if narrowest == 4:
        return {"tf32": TF32, "bf16": HALF}.get(_inside_float32(device), FLOAT32)
    return FLOAT64 if narrowest > 4 else HALF


def _inside_float32(device: str) -> str:
    """What kernels may compute with where their tensors are float32."""
    backends = ("generic", "cuda" if device == "cuda" else "mkldnn")
    found = {value for name, value in modes.flags().values if name.partition(".")[0] in backends}
    return next((name for name in ("bf16", "tf32") if name in found), "ieee")


@dataclass(frozen=True)
class Deviation:
    """How far one tensor is off: `size` is relative, and infinite where there is no number; `note` says why."""

    kind: str
    name: str
    shape: str
    size: float
    allowed: float
    note: str = ""

    @property
    def label(self) -> str:
        """What the tensor is called in a line of text."""
        return f"gradient of {self.name}" if self.kind == "gradient" else f"{self.kind} {self.name}"

    @property
    def is_excess(self) -> bool:
        return not self.size <= self.allowed


def compare(kind: str, pairs: Sequence[Pair], allowance: Tolerance) -> list[Deviation]:
    """The deviations of (name, found, wanted), all of one kind; numbers and None are compared as they are."""
    gaps = [_gap(found, wanted) for _, found, wanted in pairs]
    share = allowance.gradient_floor if kind == "gradient" else allowance.floor
    floor = share * max((extent for _, extent, _ in gaps), default=0.0)
    return [
        Deviation(kind, name, _shape(found, wanted), _ratio(gap, max(extent, floor)), allowance.allowed, note)
        for (name, found, wanted), (gap, extent, note) in zip(pairs, gaps, strict=True)
    ]


def is_finite(value: Any) -> bool:
    """Whether a tensor, if it is one, has neither NaN nor infinity in it."""
    return not isinstance(value, torch.Tensor) or bool(_dense(value).isfinite().all())


def _gap(found: Any, wanted: Any) -> tuple[float, float, str]:
    """The largest entry of the difference and of what is wanted; the reason where there is no difference to take."""
    tensors = isinstance(found, torch.Tensor) + isinstance(wanted, torch.Tensor)
    if tensors < 2:
        agree = not tensors and found == wanted
        return (0.0, 0.0, "") if agree else (math.inf, 0.0, f"{_told(found)} for {_told(wanted)}")
    found, wanted = _dense(found), _dense(wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf, 0.0, f"{_told(found)} for {_told(wanted)}"
    if not (wanted.is_floating_point() or wanted.is_complex()):
        unequal = int((found != wanted).sum())
        return (math.inf, 0.0, f"{unequal} entries differ") if unequal else (0.0, 0.0, "")
    return (*_distance(found, wanted), "") if wanted.numel() else (0.0, 0.0, "")


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """As in `_gap`; NaN and infinities are no distance apart where both have them, and an infinite one elsewhere."""
    if wanted.dtype.itemsize <= 2:
        found, wanted = found.float(), wanted.float()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    gap = (found - wanted).abs().nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(same, 0)
    extent = wanted.abs().nan_to_num_(nan=0.0, posinf=0.0)
    return float(gap.max()), float(extent.max())


def _ratio(gap: float, extent: float) -> float:
    if gap == 0:
        return 0.0
    return gap / extent if extent else math.inf


def _dense(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.to_dense() if value.layout != torch.strided else value


def _shape(found: Any, wanted: Any) -> str:
    tensor = next((value for value in (wanted, found) if isinstance(value, torch.Tensor)), None)
    return "" if tensor is None else str(tuple(tensor.shape))


def _told(value: Any) -> str:
    """A value in words."""
    if not isinstance(value, torch.Tensor):
        return "nothing" if value is None else repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
