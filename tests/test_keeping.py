"""Gradients in memory that may be kept."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mpsrun.run import keeping
from mpsrun.run.keeping import Keeper

KINDS: dict[str, list[Tensor | None]] = {
    "one": [torch.randn(3)],
    "many": [torch.randn(n, 3) for n in range(1, 20)],
    "none of some": [None, torch.randn(2), None, torch.randn(5, 2), None],
    "none of all": [None, None],
    "dtypes": [torch.randn(3), torch.randn(3).double(), torch.randn(2).half(), torch.randn(4).double()],
    "strides": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 6).t(), torch.randn(3)],
    "expanded": [torch.randn(1).expand(4), torch.randn(7), torch.randn(3, 1).expand(3, 5)],
    "gaps": [torch.randn(8, 2)[:, 0], torch.randn(6)],
    "scalars and nothing": [torch.randn(()), torch.randn(0, 3), torch.randn(())],
    "sparse": [torch.ones(1, 1).to_sparse(), torch.ones(2, 3).to_sparse(), torch.randn(4)],
    "the same twice": [KEPT := torch.randn(5), KEPT],
}


@pytest.mark.parametrize("large_bytes", [1 << 18, 16, 0])
@pytest.mark.parametrize("name", KINDS)
def test_copies_are_equal_and_own(monkeypatch: pytest.MonkeyPatch, name: str, large_bytes: int) -> None:
    monkeypatch.setattr(keeping, "LARGE_BYTES", large_bytes)
    given = KINDS[name]
    before = [None if x is None else x.clone() for x in given]
    keeper = Keeper(given)
    first, second = (keeper.hand_out(keeper.gather(given)) for _ in range(2))
    assert [x is None for x in first] == [x is None for x in given]
    for copy in (x for x in first if x is not None):
        copy.mul_(7)
    for copy, gradient, wanted in zip(second, given, before, strict=True):
        if copy is not None and gradient is not None:
            torch.testing.assert_close(copy, wanted, rtol=0, atol=0)
            if gradient.is_sparse:
                continue
            assert copy.data_ptr() % keeping.ALIGN_BYTES == 0
            if gradient.is_contiguous() or name == "strides":
                assert copy.stride() == gradient.stride()


def test_next_gradients_leave_earlier_copies_alone() -> None:
    keeper = Keeper(given := [torch.ones(3), torch.ones(2, 2)])
    first = keeper.hand_out(keeper.gather(given))
    for gradient in given:
        gradient.zero_()
    keeper.hand_out(keeper.gather(given))
    assert all(x is not None and x.eq(1).all() for x in first)


def test_copies_do_not_share_memory_or_versions() -> None:
    keeper = Keeper(given := [torch.zeros(3), torch.zeros(2, 2)])
    first, second = keeper.hand_out(keeper.gather(given))
    assert first is not None
    assert second is not None
    before = second._version
    first.add_(7)
    assert second.eq(0).all()
    assert second._version == before


class Steps:
    """Steps whose gradients a recording makes in the same memory each time; `kept` is what the script still has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gradients: list[Tensor], others: Sequence[Tensor] = ()) -> None:
        monkeypatch.setattr(keeping, "LARGE_BYTES", 0)
        self.gradients = gradients
        self.keeper = Keeper(gradients, True, others)
        self._gathered = self.keeper.gather(gradients)
        self.kept: list[Tensor | None] = []

    def step(self) -> bool:
        """Whether what was lent is back before it."""
        back = self.keeper.are_back()
        self.kept = self.keeper.hand_out(self._gathered)
        return back

    def drop(self, steps: int) -> None:
        for _ in range(steps):
            assert self.step()
            self.kept = []

    @property
    def are_lent(self) -> list[bool]:
        own = {gradient.untyped_storage().data_ptr() for gradient in self.gradients}
        return [kept is not None and kept.untyped_storage().data_ptr() in own for kept in self.kept]


def test_lent_to_a_script_that_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, [torch.ones(4), torch.ones(2, 3).t(), torch.ones(4, dtype=torch.float64)])
    for _ in range(keeping.STEPS_BEFORE_LENDING):
        assert steps.step()
        assert not any(steps.are_lent)
        steps.kept = []
    assert steps.step()
    assert all(steps.are_lent)
    assert [kept.stride() for kept in steps.kept if kept is not None] == [(1,), (1, 3), (1,)]


def test_one_step_that_keeps_them_starts_the_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, [torch.ones(4)])
    steps.drop(keeping.STEPS_BEFORE_LENDING - 1)
    steps.step()
    kept = steps.kept
    assert steps.step()
    steps.kept = []
    steps.drop(keeping.STEPS_BEFORE_LENDING - 2)
    assert steps.step()
    assert not any(steps.are_lent)
    assert kept[0] is not None
    assert kept[0].eq(1).all()


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x.detach(), lambda x: x[1:]])
def test_what_is_lent_and_kept_is_found_out(monkeypatch: pytest.MonkeyPatch, keep: Callable[[Tensor], object]) -> None:
    steps = Steps(monkeypatch, [torch.ones(4), torch.ones(8)])
    steps.drop(keeping.STEPS_BEFORE_LENDING + 3)
    steps.step()
    assert steps.kept[1] is not None
    kept = keep(steps.kept[1])
    steps.kept = []
    assert not steps.keeper.are_back()
    del kept
    assert steps.keeper.are_back()


def test_what_shares_memory_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters with one gradient: in-place changes of one must not reach the other, nor an output."""
    one, output = torch.ones(4), torch.ones(8)
    steps = Steps(monkeypatch, [one, one.view(2, 2), torch.ones(4), output[4:]], [output])
    steps.drop(keeping.STEPS_BEFORE_LENDING)
    steps.step()
    assert steps.are_lent == [False, False, True, False]
