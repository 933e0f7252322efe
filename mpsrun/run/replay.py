"""One recording of a graph: its memory, the calls that are replayed in it, and their backward passes.

Whose recording it is, and when it serves, is decided in captured.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mpsrun.graph.state import State, applied
from mpsrun.run import counting
from mpsrun.run import state as modes
from mpsrun.run.arguments import Arguments
from mpsrun.run.beside import Beside
from mpsrun.run.executor import copy_all
from mpsrun.run.forkjoin import SECOND_BACKWARD, Function, check_versions, keeps_graph, versions_of
from mpsrun.run.keeping import Gathered, Keeper
from mpsrun.run.layout import Gradients, TensorMeta
from mpsrun.run.owing import Debt, laid_out_alike, may_owe, nodes_are_held
from mpsrun.run.packing import Packing
from mpsrun.run.plainrun import Generators, generators
from mpsrun.run.recorder import Recorder, Recording
from mpsrun.run.subject import Subject
from mpsrun.wire.messages import Flags

# What a recording was made under and cannot be changed afterwards; the era of the recorder.
Settings = tuple[Flags, State, object]


@dataclass(eq=False)
class _Call:
    """One forward, and the backwards that may come.

    body, args: whose it is and what it was called with, until its backward is through. generation: which replay of the
    recording it was. versions: of what backward reads again, and after these of what only forward has read. debt: to
    parameters that are not in its graph. backwards: how many there were. freed: whether one of them has used its memory
    again. spent: whether one came for which the script did not ask to keep the graph.
    """

    body: Body | None
    args: tuple[Any, ...] | None
    generation: int
    start: Generators | None
    versions: Sequence[int] = ()
    debt: Debt | None = None
    backwards: int = 0
    freed: bool = False
    spent: bool = False


class Thrift(NamedTuple):
    """How memory is saved where the script lets it.

    frees: backward uses the memory of what it has read again, as in plain PyTorch. lends: then it may leave the script
    large gradients where they are.
    """

    frees: bool
    lends: bool


@dataclass(eq=False)
class _Way:
    """The backward of some of the outputs, and what is recorded of it.

    present: these outputs. saved, places: the arguments that it reads, and where their versions are among those of a
    call. are_alike: whether its gradients are laid out like their parameters.
    """

    present: tuple[int, ...]
    saved: Sequence[int]
    places: Sequence[int]
    recording: Recording | None = None
    keeper: Keeper | None = None
    are_alike: bool | None = None


class Body:
    """A recording of forward with its memory, and those of backward.

    settings, thrift: what it was made under. packing: how the next one like it can be laid out, if not this one already
    (is_packed). used: in which replay of its owner's it served last. failed: why its backward cannot be recorded, if
    so. regular: how many calls in a row had one backward each, of the same outputs, and kept nothing. outgrown: whether
    one was not like that, after backward had come to free what it reads.
    """

    def __init__(
        self,
        subject: Subject,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        recorder: Recorder,
        bumps: dict[int, int],
        settings: Settings,
        packing: Packing | None,
        thrift: Thrift,
    ) -> None:
        self.settings, self._state = settings, settings[1]
        self._subject, self._run, self._recorder = subject, run, recorder
        rounds = range(max(bumps.values(), default=0))
        self._bumps = [[i for i, count in bumps.items() if count > round_] for round_ in rounds]
        self._grad = torch.is_grad_enabled()
        self._args = Arguments(args, subject.statics)
        wanted = self._args.wanted
        self._parameters = [k for k, i in enumerate(wanted) if i in subject.statics]  # by their place among the wanted
        self._others = [k for k, i in enumerate(wanted) if i not in subject.statics]
        self._may_owe = not nodes_are_held([args[wanted[k]] for k in self._parameters])
        self._gradients = self._follow(args)
        self._saved = [*self._gradients.saved]
        unread = {*subject.plain.written} - {*subject.evolving} | {*self._saved}
        read = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in unread]
        own = [i for i in read if i in subject.statics and not args[i].is_inference()]
        self._versioned = [*self._saved, *own]
        self._maybe_versioned = [i for i in read if i not in own]
        self._before: dict[int, torch.Tensor] = {}
        self._outputs: list[torch.Tensor] = []
        self._grad_outputs: dict[int, torch.Tensor] = {}
        self._ways: dict[tuple[int, ...], _Way] = {}  # by the outputs that have a gradient
        self.thrift = thrift
        self.is_packed = packing is not None
        self.packing = packing or Packing()
        self.used = 0
        self._generation = 0
        self.failed: RuntimeError | None = None
        self.regular = 0
        self._usual: tuple[int, ...] | None = None
        self.outgrown = False
        self._beside = Beside()
        self._pending: Callable[[], _Call | None] = lambda: None
        recorder.make_room()
        self._forward = recorder.record(self._forward_to_record())

    def _follow(self, args: Sequence[Any]) -> Gradients:
        """Which results have gradients, and which arguments backward reads."""
        if not self._args.wanted:
            return Gradients((), (), frozenset())
        metas = tuple(TensorMeta.of(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        return self._subject.gradients(metas, *self.settings[:2])

    def _forward_to_record(self) -> Callable[[], Any]:
        if self.is_packed:
            return self.packing.laid_out(self._compute)
        return self.packing.watched(self._compute) if self.thrift.frees else self._compute

    def _backward_to_record(self, way: _Way) -> Callable[[], Gathered]:
        backward = functools.partial(self._gathered, way)
        return self.packing.watched_backward(backward) if self.thrift.frees and not self.is_packed else backward

    def _compute(self) -> Sequence[Any]:
        # Casts that autocast keeps would be of memory that the next replay overwrites.
        torch.clear_autocast_cache()
        try:
            self._before = {i: self._args.own[i].detach().clone() for i in self._subject.evolving}
            with torch.set_grad_enabled(self._grad), self._beside.forward(), counting.gathered():
                return self._run(*self._args.own)
        finally:
            torch.clear_autocast_cache()

    # ---- calls

    @property
    def is_busy(self) -> bool:
        """Whether the activations of the last call may still be needed."""
        call = self._pending()
        return call is not None and not call.spent

    def is_free(self) -> bool:
        """Whether the script has nothing that the next forward would overwrite; to be asked once before each."""
        return all(way.keeper.are_back() for way in self._ways.values() if way.keeper is not None)

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether everything is where it was, and as large."""
        return self._args.fit(args)

    def call(self, args: tuple[Any, ...]) -> Any:
        """One forward pass; the results are the caller's to keep."""
        if not any(self._gradients.differentiable):
            with torch.no_grad():
                return self._put_together([_copied(output) for output in self._replay(args)])
        start = generators() if self._subject.is_random else None
        call = _Call(self, args, self._generation + 1, start)
        self._pending = weakref.ref(call)
        wanted = [args[i] for i in self._args.wanted]
        parameters = [wanted[k] for k in self._parameters]
        if self._may_owe and may_owe(parameters):
            call.debt = Debt(parameters)
            wanted = [call.debt.token, *[wanted[k] for k in self._others]]
        outputs = _Replay.apply(call, *wanted)
        call.versions = self._versions(args)  # also with what the graph itself has written
        return self._put_together(outputs)

    def _put_together(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The graph's result with these in the place of its tensors."""
        left = iter(tensors)
        return type(self._result)(next(left) if isinstance(x, torch.Tensor) else x for x in self._result)

    def replay(self, call: _Call) -> tuple[torch.Tensor, ...]:
        """The results of forward, in fresh memory."""
        if call.args is None:
            raise RuntimeError("mpsrun: a call that is over")
        return tuple(map(_copied, self._replay(call.args)))

    def _replay(self, args: Sequence[Any]) -> list[torch.Tensor]:
        self._recorder.follow()
        self._args.take(args)
        self._generation += 1
        self._result = self._forward.replay()
        self._outputs = _tensors(self._result)
        for bumped in self._bumps:
            torch.autograd.graph.increment_version([args[i] for i in bumped])
        return self._outputs

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """By tensor of the result, whether it may have a gradient."""
        return self._gradients.differentiable

    # ---- backward

    def differentiate(
        self, ctx: Any, call: _Call, gradients: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of what the call has in its graph, in memory that may be kept; what is owed is paid."""
        present = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        way = self._way(present)
        check_versions(call.args, way.saved, [call.versions[k] for k in way.places])
        given = [gradient for gradient in gradients if gradient is not None]
        debt, are_alike = call.debt, False
        if not present:
            found: Sequence[torch.Tensor | None] = [None] * len(self._args.wanted)
        elif torch.is_grad_enabled() or modes.transformed(*given) or not self._serves(call, present):
            found = self._plainly(call, present, given)
        else:
            found = self._replay_backward(call, way, given)
            are_alike = debt is not None and self._are_alike(debt, way, found)
        if debt is not None:
            debt.pay(ctx, [found[k] for k in self._parameters], are_alike)
            found = [None, *[found[k] for k in self._others]]
        self._note(call, present)
        if not keeps_graph():
            call.spent = True
            if len(present) == sum(self.differentiable):
                call.args = call.body = None
        return found

    def _are_alike(self, debt: Debt, way: _Way, found: Sequence[torch.Tensor | None]) -> bool:
        """Whether gradients out of a recording are laid out like their parameters, as those of all its replays are."""
        if way.are_alike is None:
            own = zip(debt.parameters, [found[k] for k in self._parameters], strict=True)
            way.are_alike = all(gradient is None or laid_out_alike(p, gradient) for p, gradient in own)
        return way.are_alike

    def _versions(self, args: Sequence[Any]) -> list[int]:
        """Of what backward reads again, then of what only forward has read, which may be inference tensors."""
        given = [args[i] for i in self._maybe_versioned]
        return versions_of(args, self._versioned) + [0 if arg.is_inference() else arg._version for arg in given]

    def _way(self, present: tuple[int, ...]) -> _Way:
        """The backward of these outputs."""
        found = self._ways.get(present)
        if found is None:
            reached = self._gradients.reached
            others = {*reached(range(len(self._outputs)))} - {*reached(present)}
            places = [k for k, i in enumerate(self._saved) if i not in others]
            found = self._ways[present] = _Way(present, [self._saved[k] for k in places], places)
        return found

    def _note(self, call: _Call, present: tuple[int, ...]) -> None:
        is_regular = not call.backwards and not keeps_graph() and self._usual in (None, present)
        self.regular = self.regular + 1 if is_regular else 0
        self._usual = present
        call.backwards += 1

    def _serves(self, call: _Call, present: tuple[int, ...]) -> bool:
        """Whether the memory of the recording is that of this call, and can be computed with."""
        if self.thrift.frees:
            self.outgrown |= call.freed or keeps_graph() or self._usual not in (None, present)
        if self.outgrown or self.failed is not None:
            return False
        return call.generation == self._generation and self._recorder.era == self.settings[2]

    def _plainly(
        self, call: _Call, present: Sequence[int], given: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        """Gradients that can be differentiated again, or those of a call whose activations are gone: forward anew.

        Raises RuntimeError where what forward has read is not there any more.
        """
        plain, args = self._subject.plain, call.args
        if args is None:
            raise RuntimeError("mpsrun: a call that is over")
        places = [*self._versioned, *self._maybe_versioned]
        pairs = zip(places, self._versions(args), call.versions, strict=True)
        is_last = call.generation == self._generation
        before = self._before if is_last else {}
        changed = [i for i, version, former in pairs if version != former and i not in before]
        if not is_last:
            changed += self._subject.evolving
        if changed:
            raise RuntimeError(
                f"mpsrun must compute forward anew for this backward, but {plain.names[changed[0]]} was changed since; "
                "ask for this backward before that, keep graphs from the first step on, or use --lanes streams"
            )
        values = [before.get(i, arg).clone() if i in plain.written else arg for i, arg in enumerate(args)]
        # Forward happened outside of whatever transform backward is under.
        with temporarily_clear_interpreter_stack(), applied(self._state):
            result, _ = plain.run(values, call.start or generators())
        outputs = _tensors(result)
        return torch.autograd.grad(
            [outputs[i] for i in present],
            [values[i] for i in self._args.wanted],
            given,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )

    def _replay_backward(self, call: _Call, way: _Way, given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        for i in way.present:
            if i not in self._grad_outputs:
                self._grad_outputs[i] = torch.empty_like(self._outputs[i])
        self._recorder.follow()
        copy_all([self._grad_outputs[i] for i in way.present], given)
        if way.recording is None:
            try:
                way.recording = self._recorder.record(self._backward_to_record(way), self._forward)
            except RuntimeError as error:
                self.failed = error.with_traceback(None)  # which holds all that was recorded
                if self.thrift.frees:
                    return self._plainly(call, way.present, given)
        gathered = way.recording.replay() if way.recording is not None else self._gathered(way)
        call.freed = self.thrift.frees
        assert way.keeper is not None, "it was gathered"
        return way.keeper.hand_out(gathered)

    def _gathered(self, way: _Way) -> Gathered:
        found = self._grad_of(way.present)
        if way.keeper is None:
            others = [*self._grad_outputs.values(), *self._outputs, *self._args.tensors]
            way.keeper = Keeper(found, self.thrift.lends, others)
        return way.keeper.gather(found)

    def _grad_of(self, present: Sequence[int]) -> Sequence[torch.Tensor | None]:
        """The gradients of the last forward. Where its graph stays it serves again: each replay fills it anew."""
        with torch.autocast(self._subject.kind, enabled=False), self._beside.backward():
            return torch.autograd.grad(
                [self._outputs[i] for i in present],
                [self._args.own[i] for i in self._args.wanted],
                [self._grad_outputs[i] for i in present],
                allow_unused=True,
                retain_graph=not self.thrift.frees,
            )


class _Replay(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *_wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        body = call.body
        assert body is not None, "its backward has not come"
        outputs, flags = body.replay(call), body.differentiable
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, flags, strict=True) if not d))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        if call.body is None:
            raise RuntimeError(SECOND_BACKWARD)
        return None, *call.body.differentiate(ctx, call, gradients)


def _tensors(result: Sequence[Any]) -> list[torch.Tensor]:
    return [value for value in result if isinstance(value, torch.Tensor)]


def _copied(output: torch.Tensor) -> torch.Tensor:
    return output.detach().clone()
