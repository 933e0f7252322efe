"""What else goes on on the GPU, told from readings that flicker: a state counts once it has held for a while."""

from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

TENANT_ON_S, TENANT_OFF_S = 1.0, 3.0
SLOWED_ON_S, SLOWED_OFF_S = 2.0, 3.0
TIGHT_ON_S, TIGHT_OFF_S = 0.3, 3.0
BUSY_ON_S, BUSY_OFF_S = 2.0, 3.0
# Memory is short below the first part of all, and enough again above the second; SMs and DRAM (percent) likewise.
TIGHT_BELOW, ENOUGH_ABOVE = 0.04, 0.08
SM_BUSY, SM_IDLE = 95.0, 85.0
DRAM_BUSY, DRAM_IDLE = 90.0, 80.0


@dataclass(frozen=True)
class Reading:
    """The GPU at one moment; None: not known. slowed_by: why clocks are lower, heat and power only."""

    tenants: frozenset[int] | None = None
    tenants_mib: int | None = None
    slowed_by: tuple[str, ...] | None = None
    free_mib: int | None = None
    total_mib: int | None = None
    sm_percent: float | None = None
    dram_percent: float | None = None


@dataclass(frozen=True)
class Load:
    """What a plan was chosen under: others on the GPU, clocks that are lowered, too little memory, a full GPU."""

    tenants: frozenset[int] = frozenset()
    slowed: bool = False
    tight: bool = False
    busy: bool = False


@dataclass(frozen=True)
class Held(Generic[Value]):
    """A value that changes once another one has held for long enough; `since_s`: since when that one has.

    first_s: when the value itself was seen first.
    """

    value: Value
    other: Value
    since_s: float = 0.0
    first_s: float = 0.0

    def seen(self, found: Value, now_s: float, hold_s: float) -> "Held[Value]":
        """What is held after `found` was seen."""
        if found == self.value:
            return replace(self, other=found)
        since_s = self.since_s if found == self.other else now_s
        if now_s - since_s >= hold_s:
            return Held(found, found, now_s, since_s)
        return replace(self, other=found, since_s=since_s)


def _off() -> Held[bool]:
    return Held(value=False, other=False)


@dataclass(frozen=True)
class Watched:
    """The load as it is held now, and the reading behind it."""

    tenants: Held[frozenset[int]] = field(default_factory=lambda: Held(frozenset(), frozenset()))
    slowed: Held[bool] = field(default_factory=_off)
    tight: Held[bool] = field(default_factory=_off)
    busy: Held[bool] = field(default_factory=_off)
    reading: Reading = field(default_factory=Reading)
    is_new: bool = True

    @property
    def load(self) -> Load:
        return Load(self.tenants.value, self.slowed.value, self.tight.value, self.busy.value)

    @property
    def is_changing(self) -> bool:
        """Whether something was seen that does not count yet."""
        return any(one.value != one.other for one in self._held)

    def first_s(self, before: Load) -> float:
        """When what differs from an earlier load was seen first, the last of it; 0 where nothing differs."""
        pairs = zip(self._held, (before.tenants, before.slowed, before.tight, before.busy), strict=True)
        return max((one.first_s for one, value in pairs if one.value != value), default=0.0)

    @property
    def _held(self) -> tuple[Held[Any], ...]:
        return self.tenants, self.slowed, self.tight, self.busy

    def seen(self, reading: Reading, now_s: float) -> "Watched":
        """What is held after a reading; what it does not tell stays as it was. The first one counts at once."""
        tenants, tight, busy = self.tenants, self.tight, self.busy
        if reading.tenants is not None:
            grows = not reading.tenants <= tenants.value
            tenants = tenants.seen(reading.tenants, now_s, self._hold_s(grows, TENANT_ON_S, TENANT_OFF_S))
        slowed = self.slowed
        if reading.slowed_by is not None:
            is_slowed = bool(reading.slowed_by)
            slowed = slowed.seen(is_slowed, now_s, self._hold_s(is_slowed, SLOWED_ON_S, SLOWED_OFF_S))
        if reading.free_mib is not None and reading.total_mib:
            limit = ENOUGH_ABOVE if tight.value else TIGHT_BELOW
            is_tight = reading.free_mib < limit * reading.total_mib
            tight = tight.seen(is_tight, now_s, self._hold_s(is_tight, TIGHT_ON_S, TIGHT_OFF_S))
        if reading.sm_percent is not None or reading.dram_percent is not None:
            sm_limit, dram_limit = (SM_IDLE, DRAM_IDLE) if busy.value else (SM_BUSY, DRAM_BUSY)
            is_busy = (reading.sm_percent or 0.0) > sm_limit or (reading.dram_percent or 0.0) > dram_limit
            busy = busy.seen(is_busy, now_s, self._hold_s(is_busy, BUSY_ON_S, BUSY_OFF_S))
        return Watched(tenants, slowed, tight, busy, reading, is_new=False)

    def _hold_s(self, is_on: bool, on_s: float, off_s: float) -> float:
        if self.is_new:
            return 0.0
        return on_s if is_on else off_s

    def told(self, before: Load) -> str:
        """How the load differs from an earlier one, with figures."""
        load, reading = self.load, self.reading
        said = []
        if came := load.tenants - before.tenants:
            said.append(f"another process on the GPU (pid {_pids(came)}, {_or_unknown(reading.tenants_mib)} MiB)")
        if gone := before.tenants - load.tenants:
            said.append(f"process {_pids(gone)} left the GPU")
        if load.slowed != before.slowed:
            why = ", ".join(reading.slowed_by or ())
            said.append(f"clocks lowered by {why}" if load.slowed else "clocks as before")
        if load.tight != before.tight:
            what = "memory is short" if load.tight else "memory is enough again"
            said.append(f"{what} ({_or_unknown(reading.free_mib)} of {_or_unknown(reading.total_mib)} MiB free)")
        if load.busy != before.busy:
            what = "the GPU is full" if load.busy else "the GPU has room"
            figures = f"SMs {_or_unknown(reading.sm_percent)} %, DRAM {_or_unknown(reading.dram_percent)} %"
            said.append(f"{what} ({figures})")
        return ", ".join(said)


def _pids(pids: frozenset[int]) -> str:
    return ", ".join(str(pid) for pid in sorted(pids)[:3]) + (", ..." if len(pids) > 3 else "")


def _or_unknown(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
