"""Max pooling with the channels last: maxima and gradients as torch has them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mpsrun.run.pooling import max_pool2d

LAST = torch.channels_last
WINDOWS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 1, 1), {}),
    ((3, 2), {"ceil_mode": True}),
    ((2,), {}),
    ((3, 1, 1, 2), {}),
    (((3, 2), (2, 1), (1, 0)), {}),
    ((), {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": False}),
    ((3, 2, 1, 1, True, False), {}),
]


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=LAST).requires_grad_()


@pytest.mark.parametrize(("args", "kwargs"), WINDOWS)
def test_as_torch_has_it(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = images()
    own, torchs = max_pool2d(x, *args, **kwargs), F.max_pool2d(x, *args, **kwargs)
    assert type(own.grad_fn).__name__ == "_MaxPoolBackward"
    assert torch.equal(own, torchs)
    assert own.stride() == torchs.stride()
    some = torch.randn(3, *own.shape, dtype=x.dtype)
    of_each = [torch.autograd.grad(torchs, x, given, retain_graph=True)[0] for given in some]
    for given, wanted in zip(some, of_each, strict=True):
        (found,) = torch.autograd.grad(own, x, given, retain_graph=True)
        torch.testing.assert_close(found, wanted)
        assert found.stride() == x.stride()
    (batched,) = torch.autograd.grad(own, x, some, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(of_each))


def test_by_name() -> None:
    x = images()
    assert torch.equal(max_pool2d(input=x, kernel_size=2), F.max_pool2d(x, 2))


def test_gradients_of_gradients() -> None:
    torch.autograd.gradgradcheck(lambda x: max_pool2d(x, 3, 1, 1).square(), images())


@pytest.mark.parametrize("batch", [0, 1])
def test_few_images(batch: int) -> None:
    x = torch.randn(batch, 1, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    (found,) = torch.autograd.grad(max_pool2d(x, 3, 1, 1).sum(), x)
    (wanted,) = torch.autograd.grad(F.max_pool2d(x, 3, 1, 1).sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("x", [images(torch.bfloat16), images().detach().contiguous().requires_grad_()])
def test_what_torch_sums_up_itself(x: torch.Tensor) -> None:
    """Where a sum would be less exact, and where it is not needed."""
    assert type(max_pool2d(x, 3, 1, 1).grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"


def test_torch_is_asked_where_results_must_be_the_same() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert type(max_pool2d(images(), 3, 1, 1).grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"
    finally:
        torch.use_deterministic_algorithms(False)
