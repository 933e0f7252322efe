"""The lead's modes and global settings, as data that travels with each step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from mpsrun.graph.state import Autocast, State
from mpsrun.wire.messages import Flags

_set_by_script: list[bool] = []  # `cudnn.benchmark`, while it is another for a moment
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)


def ambient(device: str) -> State:
    """Grad, inference and autocast modes of the calling thread, all of them explicit, as far as `device` needs them."""
    autocast: tuple[Autocast, ...] = ()
    if torch.is_autocast_enabled(device):
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        autocast = (Autocast(device, True, dtype),)
    inference = torch.is_inference_mode_enabled()
    return State(
        grad=None if inference else torch.is_grad_enabled(),
        inference=inference or None,
        autocast=autocast,
        cache=torch.is_autocast_cache_enabled(),
    )


def transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, or made one of these tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    # `is_grads_batched` has a vmap of its own, which leaves no other trace.
    return any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def convolves_in_tf32() -> bool:
    """Whether cuDNN may compute a convolution of float32 on tensor cores."""
    return str(torch._C._get_fp32_precision_getter("cuda", "conv")) == "tf32"


def flags() -> Flags:
    """The global settings that change what a kernel computes; as a rule the same object where they are the same."""
    return _flags(tuple([read() for read in _READS]))


@functools.lru_cache(maxsize=16)
def _flags(values: tuple[bool | int | str, ...]) -> Flags:
    return Flags(tuple(zip(_SETTINGS, values, strict=True)))


def apply_flags(settings: Flags | None) -> None:
    """Make another process's settings this process's own; None leaves them as they are."""
    for name, value in () if settings is None else settings.values:
        read, write = _SETTINGS[name]
        if read() != value:
            write(value)


@contextlib.contextmanager
def choosing(by_time: bool) -> Iterator[None]:
    """Have torch time cuDNN's algorithms, or take what cuDNN recommends, whatever the script has set.

    `flags` goes on to tell what that is: recordings of other threads are made for it.
    """
    before = _times_algorithms()
    _set_by_script.append(before)
    torch._C._set_cudnn_benchmark(by_time)
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)
        _set_by_script.pop()


def _times_algorithms() -> bool:
    first = _set_by_script[:1]  # in one go: another thread may end its choosing
    return first[0] if first else torch._C._get_cudnn_benchmark()


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _precision(backend: str, operation: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return (
        functools.partial(torch._C._get_fp32_precision_getter, backend, operation),
        functools.partial(torch._C._set_fp32_precision_setter, backend, operation),
    )


# What each name reads and how it is written. Of precisions only the newer form, which the older one keeps up to date:
# reading the older form raises once a script has used the newer one.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "deterministic": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "fill_uninitialized": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "cudnn.enabled": (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    "cudnn.benchmark": (_times_algorithms, torch._C._set_cudnn_benchmark),
    "cudnn.deterministic": (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    "mkldnn.enabled": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "fp16_reduction": (
        lambda: torch._C._get_cublas_allow_fp16_reduced_precision_reduction()[0],
        lambda value: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", value),
    ),
    "bf16_reduction": (
        lambda: torch._C._get_cublas_allow_bf16_reduced_precision_reduction()[0],
        lambda value: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", value),
    ),
    "sdp.flash": (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    "sdp.efficient": (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    "sdp.math": (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    "sdp.cudnn": (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    **{f"{backend}.{op}": _precision(backend, op) for backend, op in _PRECISIONS},
}
_READS = [read for read, _ in _SETTINGS.values()]
