"""Finds the networks of an unchanged script: every outermost module with parameters that it calls is compiled in place.

While it is installed, `torch.nn.Module` has a class-wide `_compiled_call_impl`, the very attribute in which
`module.compile()` leaves the compiled call of one module. It goes away once the script's training step is known.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mpsrun import log
from mpsrun.run import backend, report
from mpsrun.run.state import transformed

DONE_STEPS = 2  # optimizer steps after which every network of a training step has been called
MOST_FRESH = 12  # calls in a row that may need another graph each, before a network is left alone
RECOMPILE_LIMIT = 256  # train/eval, grad, frozen, autocast and batch sizes multiply


def install() -> None:
    """Start to look for networks. Takes itself away when done."""
    Discovery().install()


class Discovery:
    """Runs the first call of each outermost module plain, and compiles it in place for the calls after."""

    def __init__(self) -> None:
        self._thread = threading.local()
        self._steps = 0
        self._step_hook: Any = None

    def install(self) -> None:
        discovery = self

        def first_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if callable(get_eval_frame_callback()):  # a `torch.compile` of the script's is at work
                return module._call_impl(*args, **kwargs)
            return discovery.call(module, args, kwargs)

        _hide(first_call)
        nn.Module._compiled_call_impl = first_call  # type: ignore[assignment]
        self._step_hook = register_optimizer_step_post_hook(self._stepped)

    def remove(self) -> None:
        """Leave torch as it was; what has been compiled stays compiled."""
        nn.Module._compiled_call_impl = None
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of any module that has not been compiled."""
        if getattr(self._thread, "inside", False) or not _is_network(module):
            return module._call_impl(*args, **kwargs)
        self._thread.inside = True
        try:
            result = module._call_impl(*args, **kwargs)
        finally:
            self._thread.inside = False
        compile_in_place(_core(module))
        return result

    def _stepped(self, *_: Any) -> None:
        self._steps += 1
        if self._steps == DONE_STEPS:
            self.remove()


def _hide(function: Callable[..., Any]) -> None:
    """A `torch.compile` of the script's sees what this function calls, but not the function itself."""
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, default))


def compile_in_place(module: nn.Module) -> None:
    """Compile a module's call with this backend. Names in its `state_dict` do not change.

    A network of which nothing leaves the lead in training is given its plain call back, and so is one that Dynamo
    compiles anew in every call, for instance since it collects its losses in a list.
    """
    if module.__dict__.get("_compiled_call_impl") is not None:
        return
    _prepare_dynamo()
    log.detail(f"compiling {type(module).__name__} in place")
    module.compile(backend=backend.mpsrun)
    compiled = module._compiled_call_impl
    decided, fresh, odd = False, 0, OddInputs(type(module).__name__)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal decided, fresh
        if callable(get_eval_frame_callback()) or _looked_through() or odd(*args, *kwargs.values()):
            return module._call_impl(*args, **kwargs)
        before, known = backend.Graph.entered, len(report.graphs)
        result = compiled(*args, **kwargs)  # type: ignore[misc]
        fresh = fresh + 1 if len(report.graphs) > known else 0
        if fresh == MOST_FRESH:
            log.detail(f"{type(module).__name__} changes with every call, it runs plain")
            module._compiled_call_impl = None
        if not decided and torch.is_grad_enabled():
            decided = True
            if backend.Graph.entered == before:  # asked so, since networks of one kind share their graphs
                module._compiled_call_impl = None
        return result

    _hide(call)
    module._compiled_call_impl = call


class OddInputs:
    """Tells which calls of a network run plain because of their inputs, with the reason, once each."""

    def __init__(self, network: str) -> None:
        self._network = network
        self._told: set[str] = set()

    def __call__(self, *values: Any) -> bool:
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            ordinary = type(value) in (torch.Tensor, nn.Parameter)
            if ordinary and value.layout is torch.strided and not value.is_nested:
                continue
            found = str(value.layout).removeprefix("torch.") if ordinary else type(value).__name__
            if found not in self._told:
                self._told.add(found)
                log.detail(f"{self._network} runs plain for inputs that are {found} tensors")
            return True
        return False


def _looked_through() -> bool:
    """Whether somebody follows the ops of this call one by one, and so must meet the plain call.

    That is a tracer, an exporter, a transform of torch.func, a mode of the script's, or its hook on all modules.
    Dynamo would not notice that such a hook has come, and take a mode's answer to one op for that to another.
    """
    return (
        _has_any_global_hook()
        or torch.jit.is_tracing()
        or transformed()
        or is_fx_symbolic_tracing()
        or is_in_torch_dispatch_mode()
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def _is_network(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or torch.compiler.is_compiling() or _looked_through():
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


def _prepare_dynamo() -> None:
    """Settings without which Dynamo would give up on ordinary training scripts."""
    import torch._dynamo.config as dynamo

    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the script did not ask for a compiler
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
    dynamo.allow_rnn = True
    dynamo.allow_unspec_int_on_nn_module = True  # else a network that counts its steps is compiled for each of them
    dynamo.skip_nnmodule_hook_guards = False
    dynamo.suppress_errors = True  # what Dynamo cannot handle runs plain, frame by frame
