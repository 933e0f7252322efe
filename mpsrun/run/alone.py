"""One branch compiled by itself: first it is asked for its graph and inputs, later it is answered with the outputs.

    question = alone.ask(args, kwargs)            guards are checked, a new graph is compiled; no op runs
    outputs = ...                                 computed by whoever has time
    result = question.answered(outputs)           the same call once more, which now returns

Dynamo would run one branch after the other. So asked, all branches of a set are known before any of them runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.exc
from torch import fx, nn

from mpsrun.errors import first_line
from mpsrun.run.part import Part

Outputs = tuple[Any, ...]
_NOT_COMPILED = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a branch, which Dynamo does not know as one graph. worked: told when it raised nothing."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    worked: Callable[[], None]

    def here(self) -> Any:
        """The result, as plain PyTorch computes it."""
        result = self.module(*self.args, **self.kwargs)
        self.worked()
        return result


@dataclass(frozen=True, eq=False)
class Known:
    """The result of a call in which Dynamo found nothing to compile."""

    result: Any

    def here(self) -> Any:
        """The result."""
        return self.result


@dataclass(frozen=True, eq=False)
class Question:
    """A call that waits for the outputs of its graph. args: the inputs of the graph."""

    part: Part
    args: tuple[Any, ...]
    resume: Callable[[Part, Outputs], Any]

    def here(self) -> Any:
        """The result, computed in the lead."""
        return self.answered(self.part.here(self.args))

    def answered(self, outputs: Outputs) -> Any:
        """The result of the call, from the outputs of its graph."""
        return self.resume(self.part, outputs)


class Alone:
    """A branch that Dynamo compiles once for each of its own states, whichever other branches run beside it.

    refuse: called with the reason where Dynamo cannot compile the branch as one graph.
    """

    def __init__(
        self, module: nn.Module, new_part: Callable[[fx.GraphModule], Part], refuse: Callable[[str], None]
    ) -> None:
        self.module = module
        self._refuse = refuse
        self._reason: str | None = None  # why Dynamo is not asked any more
        self._backend = _Backend(new_part, type(module).__name__)
        self._compiled = torch.compile(caller(module), backend=self._backend, fullgraph=True)

    def ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Question | Known | Call:
        """What a call of the branch needs to know."""
        if self._reason is not None:
            return Call(self.module, args, kwargs, lambda: None)
        try:
            return Known(self._compiled(*args, **kwargs))
        except _Asked as asked:
            return Question(asked.part, asked.inputs, lambda *answer: self._repeat(answer, args, kwargs))
        except _NOT_COMPILED as error:
            reason = f"{type(self.module).__name__}: {first_line(error) or type(error).__name__}"
            return Call(self.module, args, kwargs, lambda: self._give_up(reason))

    def _give_up(self, reason: str) -> None:
        """Do not try again: it is not the script's own error that Dynamo met."""
        self._reason = reason
        self._refuse(reason)

    def _repeat(self, answer: tuple[Part, Outputs], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._backend.answer = answer
        try:
            return self._compiled(*args, **kwargs)
        finally:
            self._backend.answer = None


class _Backend(threading.local):
    """Compiled calls stop in front of their graph, unless there is an answer for this thread.

    Dynamo keeps it for good, and so it must not hold the module.
    """

    answer: tuple[Part, Outputs] | None = None

    def __init__(self, new_part: Callable[[fx.GraphModule], Part], name: str) -> None:
        self._new_part, self._name = new_part, name

    def __call__(self, gm: fx.GraphModule, _example_inputs: Any) -> Callable[..., Outputs]:
        part = self._new_part(gm)

        def meet(*inputs: Any) -> Outputs:
            if self.answer is None:
                raise _Asked(part, inputs)
            asked, outputs = self.answer
            if asked.code != part.code:
                raise RuntimeError(
                    f"expected branches that do not depend on each other, found that {self._name} changes with what "
                    "another one does; give such branches to different `Branches`"
                )
            return outputs

        return meet


class _Asked(BaseException):
    """Leaves a compiled call in front of its graph. Not an `Exception`, which a branch may catch."""

    def __init__(self, part: Part, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.part, self.inputs = part, inputs


def caller(module: Callable[..., Any]) -> Callable[..., Any]:
    """A function with code of its own: Dynamo keeps and counts what it compiles by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call
