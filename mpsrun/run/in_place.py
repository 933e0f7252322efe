"""A network whose call is compiled in place, and when its plain call is made instead.

It is still the script's network: whoever reads it op by op must find what they would find in plain PyTorch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mpsrun import config, log
from mpsrun.run import backend, report
from mpsrun.run.branches import Branches
from mpsrun.run.state import transformed

MOST_FRESH = 12  # calls in a row that may need another graph each, before a network is left alone
LOOK_S = 0.1  # how often a network that rests looks at the load
RECOMPILE_LIMIT = 256  # train/eval, grad, frozen, autocast and batch sizes multiply
# Dynamo's settings without which it would give up on ordinary training scripts.
DYNAMO = {
    "allow_rnn": True,
    "allow_unspec_int_on_nn_module": True,  # else a network that counts its steps is compiled for each of them
    "skip_nnmodule_hook_guards": False,
    "suppress_errors": True,  # what Dynamo cannot handle runs plain, frame by frame
}
CHANGED = (*DYNAMO, "recompile_limit", "accumulated_recompile_limit")


class _Inside(threading.local):
    """Whether this thread is in a plain call of a network: what that calls belongs to it, and is no network."""

    network = False


inside = _Inside()


def called_plainly(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The plain call of a network."""
    before, inside.network = inside.network, True
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        inside.network = before


def compile_in_place(module: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Compile a module's call with this backend and its options. Names in its `state_dict` do not change."""
    if module.__dict__.get("_compiled_call_impl") is not None:
        return
    prepare_dynamo()
    log.detail(f"compiling {type(module).__name__} in place")
    module.compile(backend=backend.mpsrun, options=options)
    ours = _Call(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        if callable(get_eval_frame_callback()):  # a `torch.compile` of the script's is at work, and would look in here
            return module._call_impl(*args, **kwargs)
        return ours(args, kwargs)

    hide(call)
    module._compiled_call_impl = call  # a function: torch.jit.script would try to make sense of anything else


class _Call:
    """Calls a network compiled, or plain where the call is looked through or its inputs are odd.

    A network of which nothing leaves the lead in training is given its plain call back, and so is one that Dynamo
    compiles anew in every call, for instance since it collects its losses in a list. One whose plain run was the
    fastest rests: its calls are plain until the load is another one, and its plans are tried again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
        self._decided = False
        self._graphs: list[report.Graph] = []
        self._fresh = 0
        self._rests, self._looked_s = False, 0.0
        self._told: set[str] = set()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if looked_through() or self._odd(*args, *kwargs.values()) or (self._rests and not self._wakes()):
            return called_plainly(self._module, args, kwargs)
        entered, known = backend.calls.entered, len(report.graphs)
        result = self._compiled(*args, **kwargs)
        self._graphs += report.graphs[known:]
        graphs, last = backend.calls.entered - entered, backend.calls.last
        if graphs and last is not None and not any(graph is last for graph in self._graphs):
            self._graphs.append(last)  # of another network of its kind
        self._fresh = self._fresh + 1 if len(report.graphs) > known else 0
        if self._fresh == MOST_FRESH:
            self._give_up("Dynamo compiles it anew in every call")
        elif not self._decided and torch.is_grad_enabled():
            self._decided = True
            if not graphs:  # asked so, since networks of one kind share their graphs
                self._tell_plain()
        elif self._decided and self._graphs and graphs <= len(self._graphs):
            self._consider_rest()
        return result

    def _consider_rest(self) -> None:
        if all(graph.plain for graph in self._graphs):
            self._give_up("nothing else is faster")
        elif self._looks() and self._may_rest():
            self._rests = True
            log.detail(f"{type(self._module).__name__} runs plain while the load stays: nothing else is faster")

    def _wakes(self) -> bool:
        """Whether plans are to be tried again, or one from before is taken. Evaluation does not ask."""
        if torch.is_grad_enabled() and self._looks():
            self._rests = self._may_rest()
        return not self._rests

    def _may_rest(self) -> bool:
        answers = [graph.plain if graph.rests is None else graph.rests() for graph in self._graphs]  # all of them look
        return all(answers)

    def _looks(self) -> bool:
        """Whether it is time to look at the load: no more often than there are samples."""
        now_s = time.monotonic()
        is_due = now_s - self._looked_s >= LOOK_S
        if is_due:
            self._looked_s = now_s
        return is_due

    def _tell_plain(self) -> None:
        """Without a word it would look as if mpsrun had done nothing."""
        if any(isinstance(module, Branches) for module in self._module.modules()):
            self._give_up("nothing of it but its Branches can use a lane")
        else:
            hint = "" if config.current().verbose else " (--verbose says why)"
            self._give_up(f"nothing of it can use a lane{hint}", log.say)

    def _give_up(self, reason: str, say: Callable[[str], None] = log.detail) -> None:
        self._module.__dict__.pop("_compiled_call_impl", None)  # what the class has sees to what it calls
        say(f"{type(self._module).__name__} runs plain: {reason}")

    def _odd(self, *values: Any) -> bool:
        """Whether an input is a tensor that Dynamo would give up on for good; says so once."""
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            ordinary = type(value) in (torch.Tensor, nn.Parameter)
            if ordinary and value.layout is torch.strided and not value.is_nested:
                continue
            kind = str(value.layout).removeprefix("torch.") if ordinary else type(value).__name__
            if kind not in self._told:
                self._told.add(kind)
                log.detail(f"{type(self._module).__name__} runs plain for inputs that are {kind} tensors")
            return True
        return False


def looked_through() -> bool:
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


def hide(function: Callable[..., Any]) -> None:
    """A `torch.compile` of the script's sees what this function calls, but not the function itself."""
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, default))


def prepare_dynamo() -> None:
    """Raise Dynamo's limits, and set what else it needs."""
    import torch._dynamo.config as dynamo

    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the script did not ask for a compiler
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
    for name, value in DYNAMO.items():
        setattr(dynamo, name, value)
