"""Copies of gradients in memory that may be kept."""

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
    first, second = (keeper.copies(keeper.gather(given)) for _ in range(2))
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
    first = keeper.copies(keeper.gather(given))
    for gradient in given:
        gradient.zero_()
    keeper.copies(keeper.gather(given))
    assert all(x is not None and x.eq(1).all() for x in first)


def test_copies_do_not_share_memory_or_versions() -> None:
    keeper = Keeper(given := [torch.zeros(3), torch.zeros(2, 2)])
    first, second = keeper.copies(keeper.gather(given))
    assert first is not None
    assert second is not None
    before = second._version
    first.add_(7)
    assert second.eq(0).all()
    assert second._version == before
