"""Finds the networks of an unchanged script: every outermost module with parameters that it calls is compiled in place.

While it is installed, `torch.nn.Module` has a class-wide `_compiled_call_impl`, the very attribute in which
`module.compile()` leaves the compiled call of one module. It goes away once the script's training step is known.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpsrun import log
from mpsrun.run.in_place import called_plainly, compile_in_place, hide, inside, looked_through

DONE_STEPS = 2  # optimizer steps after which every network of a training step has been called


def install(why_none: str | None = None) -> None:
    """Start to look for networks. Takes itself away when done.

    why_none: why none of them is to be compiled, if so; then the first one is told of.
    """
    Discovery(why_none).install()


class Discovery:
    """Runs the first call of each outermost module plain, and compiles it in place for the calls after."""

    def __init__(self, why_none: str | None = None) -> None:
        self._why_none = why_none
        self._found: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._steps = 0
        self._step_hook: Any = None

    def install(self) -> None:
        discovery = self

        def first_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if callable(get_eval_frame_callback()):  # a `torch.compile` of the script's is at work
                return module._call_impl(*args, **kwargs)
            return discovery.call(module, args, kwargs)

        hide(first_call)
        nn.Module._compiled_call_impl = first_call  # type: ignore[assignment]
        self._step_hook = register_optimizer_step_post_hook(self._stepped)

    def remove(self) -> None:
        """Leave torch as it was; what has been compiled stays compiled."""
        nn.Module._compiled_call_impl = None
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of any module that is not compiled, be it that it runs plain since it was."""
        if inside.network or not _is_network(module):
            return module._call_impl(*args, **kwargs)
        if self._why_none is not None:
            self.remove()
            log.say(f"{self._why_none}: {type(module).__name__} runs plain; --lanes workers tries lanes on the CPU")
            return module._call_impl(*args, **kwargs)
        result = called_plainly(module, args, kwargs)
        network = _core(module)
        if network not in self._found:
            self._found.add(network)
            compile_in_place(network)
        return result

    def _stepped(self, *_: Any) -> None:
        self._steps += 1
        if self._steps == DONE_STEPS:
            self.remove()


def _is_network(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or torch.compiler.is_compiling() or looked_through():
        return False
    if "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return any(True for _ in module.parameters())


def _core(module: nn.Module) -> nn.Module:
    """The network inside a data-parallel wrapper, which keeps its own bookkeeping around the call."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.module
    return module
