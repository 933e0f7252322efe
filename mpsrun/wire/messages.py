"""What lead and workers say to each other: nothing but typed data.

A *job* is one worker's share of a region: a program with its parameters bound. A *layout* is a job for given shapes:
where in a slot each tensor stands. A message that starts work carries a sequence number; the worker's counter reaches
that number when the work is done. A report names its sender by the worker's index and generation: how many processes
had this index before.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from mpsrun.device import ChunkHandle, TensorRef
from mpsrun.graph.program import Program, State

PROTOCOL = 6
Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """Room in the arena for the tensors of one invocation: a chunk and where in it (bytes)."""

    chunk: int
    offset_bytes: int


class Rng(msgspec.Struct, frozen=True, array_like=True):
    """The place of each random op of a job in the lead's Philox sequence."""

    seed: int
    offsets: tuple[int, ...]


class Static(msgspec.Struct, frozen=True, array_like=True):
    """A parameter or buffer bound to an input of a program."""

    input: int
    tensor: TensorRef
    requires_grad: bool


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in a slot: `tensor.offset_bytes` counts from the start of the slot, `tensor.chunk` is not used."""

    index: int
    tensor: TensorRef
    requires_grad: bool


class Start(msgspec.Struct, frozen=True, tag=True):
    """Take this device; `ring` is where later messages come.

    Counters: `submitted` and `step` are the lead's, `done` and `progress` the worker's own. The last step of a replay
    that is released, and the last one that is finished, start at 0 in each replay.
    """

    protocol: int
    device: str
    device_index: int
    counters: ChunkHandle
    submitted: int
    done: int
    step: int
    progress: int
    threads: int
    ring: str


class Map(msgspec.Struct, frozen=True, tag=True):
    """Map a chunk."""

    chunk: ChunkHandle


class Unmap(msgspec.Struct, frozen=True, tag=True):
    """Unmap chunks, which the lead no longer has."""

    chunks: list[int]


class Load(msgspec.Struct, frozen=True, tag=True):
    """A job's program."""

    job: int
    program: Program


class Bind(msgspec.Struct, frozen=True, tag=True):
    """Where the parameters and buffers of a job are; sent again when the lead's memory moved."""

    job: int
    statics: list[Static]


class Flags(msgspec.Struct, frozen=True, array_like=True):
    """Global settings of torch that decide about results and that no program carries, as (name, value) pairs."""

    values: tuple[tuple[str, bool | int | str], ...]


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Make a layout known, and run it once on zeros, so that kernels are loaded before they are waited for.

    Workers of one region share the number of their layout; `position` is the worker's place among them. `share`: where
    its share of the GPU's multiprocessors starts and how large it is, in percent. `flags`: the global settings for that
    run, since cuDNN's choices at the first run are kept. `compiled`: whether Inductor is to compile the job before it.
    """

    layout: int
    position: int
    job: int
    grad: bool
    state: State
    inputs: list[Place]
    ints: dict[int, int]
    outputs: list[Place]
    writes: list[Place]
    grad_outputs: list[Place]
    grad_inputs: list[Place]
    share: tuple[Percent, Percent] = (0, 100)
    flags: Flags | None = None
    compiled: bool = False


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Layouts, jobs and relays that will not be used again."""

    layouts: list[int]
    jobs: list[int]
    relays: list[int] = []


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Run a layout's jobs on what stands in the slot; all workers of a region get the same message.

    `flags` only where they changed for one of them; `rngs` by position, empty where nothing is random.
    """

    seq: int
    invocation: int
    layout: int
    slot: Slot
    state: State
    flags: Flags | None
    rngs: tuple[Rng, ...]


class Task(msgspec.Struct, frozen=True, array_like=True):
    """One worker's part of a backward: which outputs have a gradient, and which inputs want one."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


class Backward(msgspec.Struct, frozen=True, tag=True):
    """The backward of a `Forward`; `tasks` by position, `keep` is retain_graph."""

    seq: int
    invocation: int
    layout: int
    slot: Slot
    tasks: tuple[Task, ...]
    keep: bool
    flags: Flags | None


class Record(msgspec.Struct, frozen=True, tag=True):
    """Record a relay, which is computed in each `Replay` of it; to be answered by `Recorded`.

    steps: this worker's, in order; their `seq` is the number of the step.
    """

    relay: int
    steps: list[Forward | Backward]
    flags: Flags


class Replay(msgspec.Struct, frozen=True, tag=True):
    """Run a relay once more. `flags` only where they changed for one of the workers."""

    seq: int
    relay: int
    flags: Flags | None


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Invocations whose backward will not come."""

    invocations: list[int]


class Trim(msgspec.Struct, frozen=True, tag=True):
    """Give back the memory that is kept for later use."""


class Count(msgspec.Struct, frozen=True, tag=True):
    """Ask for `Counts`."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End."""


ToWorker = (
    Start | Map | Unmap | Load | Bind | Prepare | Forget | Forward | Backward | Drop | Record | Replay | Trim | Count
    | Stop
)  # fmt: skip


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A worker has imported torch and waits for `Start`."""

    worker: int
    pid: int
    protocol: int
    generation: int = 0


class Started(msgspec.Struct, frozen=True, tag=True):
    """The device is open."""

    worker: int
    generation: int = 0


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """A layout has been run once and is ready; `uncompiled`: why its job could not be compiled, where it was to be."""

    worker: int
    layout: int
    generation: int = 0
    uncompiled: str | None = None


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """A relay can be replayed from now on, or why it cannot be."""

    worker: int
    relay: int
    reason: str | None
    generation: int = 0


class NoMemory(msgspec.Struct, frozen=True, tag=True):
    """There was no memory for work `seq` (0: for preparing) of a layout. The worker has given back what it could.

    It goes on with its next message once its counter has reached `seq`: the lead does this piece of work.
    """

    worker: int
    seq: int
    layout: int
    text: str
    generation: int = 0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Something raised; the worker has drained its device, and ends."""

    worker: int
    kind: str
    text: str
    traceback: str
    generation: int = 0


class Counts(msgspec.Struct, frozen=True, tag=True):
    """How often each job ran forward and backward, by job id; how many jobs and forwards are kept at the moment."""

    worker: int
    forwards: dict[int, int]
    backwards: dict[int, int]
    jobs: int
    kept: int
    generation: int = 0


ToLead = Ready | Started | Prepared | Recorded | NoMemory | Failed | Counts
