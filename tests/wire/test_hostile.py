"""Malformed, oversized and hostile messages are refused with an error, and the run goes on or ends cleanly."""

import copy
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pool
import pytest
import torch
import zmq
from networks import Three
from torch import nn
from transparency import TOLERANCE, on_lanes

from mpsrun.config import Config
from mpsrun.device import ChunkHandle, CpuDevice, TensorRef
from mpsrun.device.base import COUNTER_BYTES
from mpsrun.errors import MpsrunError
from mpsrun.graph.program import Input, Op, Program, Ref, State
from mpsrun.run.coordinator import Coordinator
from mpsrun.run.worker import Worker
from mpsrun.wire import codec
from mpsrun.wire import messages as m
from mpsrun.wire.channel import _open
from mpsrun.wire.ring import CAPACITY_BYTES, Ring


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def pickled() -> bytes:
    import pickle

    return pickle.dumps(Evil())


def nested(depth: int) -> bytes:
    """Lists in lists, as msgpack."""
    return b"\x91" * depth + b"\xc0"


def program(name: str, *args: Any) -> Program:
    """One op over one tensor."""
    return Program(
        inputs=[Input("tensor")],
        nodes=[Op(name=name, args=args, kwargs={})],
        outputs=[1],
        writes=[],
        hidden=[],
    )


def tagged(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


NO_MESSAGE = {
    "empty": b"",
    "noise": random.Random(0).randbytes(500),
    "text": b"rm -rf /",
    "pickle": pickled(),
    "nested": nested(100_000),
    "claims to be long": b"\xdd\xff\xff\xff\xff",
    "unknown type": tagged(type="Exec", command="id"),
    "no type": tagged(seq=1),
    "wrong types": tagged(type="Unmap", chunks="all"),
    "number out of range": tagged(type="Prepare", layout=-1.5),
    "a report": codec.encode(m.Started(1)),
    "a share of more than there is": codec.encode(
        m.Prepare(1, 0, 1, False, State(), [], {}, [], [], [], [], (0, 10**9))
    ),
    "missing fields": tagged(type="Forward", seq=1),
}
HOSTILE: dict[str, m.ToWorker] = {
    "map of a file": m.Map(ChunkHandle(10**6, 4096, __file__.encode())),
    "map of more than there is": m.Map(ChunkHandle(10**6, 1 << 40, b"/proc/self/fd/0")),
    "map of nothing": m.Map(ChunkHandle(10**6, 0, b"")),
    "negative size": m.Map(ChunkHandle(10**6, -1, b"/dev/zero")),
    "unmap of what is not mapped": m.Unmap([10**6]),
    "op that is not on the list": m.Load(10**6, program("os.system", "id")),
    "method that is not on the list": m.Load(10**6, program("Tensor.__reduce_ex__", Ref(0))),
    "attribute that is not on the list": m.Load(10**6, program("attr.__class__", Ref(0))),
    "op with a file": m.Load(10**6, program("torch.load", "/etc/passwd")),
    "path through a module": m.Load(10**6, program("torch.utils.cpp_extension.load", "x")),
    "reference to itself": m.Load(10**6, program("torch.add", Ref(1), Ref(1))),
    "reference out of range": m.Load(10**6, program("torch.add", Ref(7), Ref(0))),
    "binding outside a chunk": m.Bind(10**6, [m.Static(0, TensorRef(0, 1 << 40, (4,), (1,), "float32"), False)]),
    "dtype that is code": m.Bind(10**6, [m.Static(0, TensorRef(0, 0, (4,), (1,), "load"), False)]),
    "record of what is not known": m.Record(
        1, [m.Forward(1, 1, 10**6, m.Slot(10**6, 0), State(), None, ())], m.Flags(())
    ),
    "replay of what was not recorded": m.Replay(1, 10**6, None),
    "second start": m.Start(m.PROTOCOL + 1, "cpu", 0, ChunkHandle(0, 4096, b"/dev/zero"), 0, 1, 2, 3, 1, ""),
}


# These are also sent to a process; the rest are handled in this one.
SENT = ("map of a file", "op that is not on the list", "binding outside a chunk", "second start")


@pytest.mark.parametrize("name", NO_MESSAGE)
def test_not_decoded(name: str) -> None:
    with pytest.raises(codec.BadMessage):
        codec.decode_to_worker(NO_MESSAGE[name])


def test_reports_are_no_orders() -> None:
    with pytest.raises(codec.BadMessage):
        codec.decode_to_lead(codec.encode(m.Stop()))


@pytest.mark.parametrize("size", [codec.LIMIT_BYTES + 1, codec.LIMIT_BYTES * 2])
def test_oversized(size: int) -> None:
    with pytest.raises(codec.BadMessage, match="at most"):
        codec.decode_to_worker(bytes(size))
    with pytest.raises(codec.BadMessage, match="at most"):
        codec.encode(m.Unmap([1 << 40] * (size // 8)))


def test_mutated_messages() -> None:
    """Bytes of a real message with some of them changed are read as a message or refused, nothing else."""
    generator = random.Random(0)
    original = codec.encode(m.Load(1, program("torch.add", Ref(0), Ref(0))))
    for _ in range(2000):
        data = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            message = codec.decode_to_worker(bytes(data))
        except codec.BadMessage:
            continue
        assert isinstance(message, m.ToWorker)


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_by_a_worker(name: str) -> None:
    """What can be read and must not be done raises, before any of it is done."""
    worker = Worker(1, Silent())  # type: ignore[arg-type]
    lead = CpuDevice()
    counters = lead.new_chunk(COUNTER_BYTES)
    worker._handle(m.Start(m.PROTOCOL, "cpu", 0, counters.handle, 0, 1, 2, 3, 1, ""))
    worker._handle(m.Load(1, program("torch.add", Ref(0), Ref(0))))
    with pytest.raises((MpsrunError, ValueError, KeyError, OSError, OverflowError)):
        worker._handle(HOSTILE[name])


class Silent:
    """A channel that nobody listens to."""

    def send(self, message: m.ToLead) -> None:
        """Forget it."""


class TestRing:
    def test_order_and_wrapping(self) -> None:
        writer = Ring.create()
        reader = Ring.open(writer.path)
        generator = random.Random(0)
        for _ in range(3 * CAPACITY_BYTES // 4096):
            message = generator.randbytes(generator.randrange(8192))
            writer.write(message, 1.0)
            assert reader.read(1.0) == message

    def test_no_message(self) -> None:
        assert Ring.create().read(0.01) is None

    def test_too_large(self) -> None:
        with pytest.raises(MpsrunError, match="at most"):
            Ring.create().write(bytes(CAPACITY_BYTES), 1.0)

    def test_full(self) -> None:
        """Nobody reads: the writer has a deadline."""
        ring = Ring.create()
        for _ in range(4):
            ring.write(bytes(CAPACITY_BYTES // 5), 0.05)
        with pytest.raises(MpsrunError, match="has not read"):
            ring.write(bytes(CAPACITY_BYTES // 5), 0.05)

    def test_length_that_is_none(self) -> None:
        ring = Ring.create()
        ring.write(b"message", 1.0)
        ring._data[:4] = b"\xff\xff\xff\xff"
        with pytest.raises(MpsrunError, match="at most"):
            ring.read(1.0)

    @pytest.mark.parametrize("length", [8, 1000, CAPACITY_BYTES // 4])
    def test_length_beyond_the_message(self, length: int) -> None:
        """A record that claims more than was written is no message."""
        ring = Ring.create()
        ring.write(b"message", 1.0)
        ring._data[:4] = length.to_bytes(4, "little")
        try:
            found = ring.read(1.0)
        except MpsrunError:
            return
        assert found is not None
        with pytest.raises(codec.BadMessage):
            codec.decode_to_worker(found)


@pytest.fixture(scope="class")
def expendable() -> Iterator[Coordinator]:
    """A worker for each message: one that is refused ends the worker's work."""
    with pool.running(Config(workers=len(SENT) + 3, lanes="workers", timeout_s=20.0, worker_restarts=0)) as coordinator:
        yield coordinator


class TestWorkers:
    """The lead's numbers stay right, whatever a worker is told."""

    def test_files(self, expendable: Coordinator) -> None:
        """Sockets of this user alone, in a directory of this user alone, and no network."""
        run_dir = expendable.settings.run_dir
        assert run_dir is not None
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        addresses = [expendable.settings.worker_socket(link.index) for link in expendable.links]
        for address in [expendable.settings.report_socket, *addresses]:
            assert address.startswith("ipc://")
            assert stat.S_ISSOCK(Path(address.removeprefix("ipc://")).stat().st_mode)

    @pytest.mark.parametrize("name", SENT)
    def test_message(self, expendable: Coordinator, name: str, capfd: Any) -> None:
        pair = Pair(expendable)
        with expendable.lock:
            expendable.links[pair.victim - 1].send(HOSTILE[name])
            expendable.links[pair.victim - 1].send(m.Count())
        pair.assert_same()
        pool.wait_until(lambda: pair.victim not in expendable.usable())
        assert f"worker {pair.victim} is out" in capfd.readouterr().err
        pair.assert_same()

    def test_no_message_on_the_socket(self, expendable: Coordinator) -> None:
        """Somebody of this user sends noise: what arrives between two messages of the lead is refused."""
        pair = Pair(expendable)
        send(
            expendable.settings,
            expendable.settings.worker_socket(pair.victim),
            *NO_MESSAGE.values(),
            bytes(codec.LIMIT_BYTES + 1),
        )
        with expendable.lock:
            expendable.links[pair.victim - 1].send(m.Count())
        for _ in range(3):
            pair.assert_same()

    def test_noise_on_the_ring(self, expendable: Coordinator) -> None:
        pair = Pair(expendable)
        with expendable.lock:
            expendable._channel._rings[pair.victim - 1].write(NO_MESSAGE["noise"], 1.0)
        for _ in range(3):
            pair.assert_same()
        assert pair.victim not in expendable.usable()


@pytest.fixture(scope="class")
def few() -> Iterator[Coordinator]:
    with pool.running(Config(workers=2, lanes="workers", timeout_s=20.0, worker_restarts=0)) as coordinator:
        yield coordinator


class TestLead:
    """Reports that no worker of ours sent."""

    def test_noise(self, few: Coordinator) -> None:
        """What cannot be read is refused; an error of the run, or none, but no wrong numbers and no hang."""
        pair = Pair(few)
        send(few.settings, few.settings.report_socket, *NO_MESSAGE.values(), codec.encode(m.Stop()))
        pair.assert_same_or_refused()
        pair.assert_same()

    @pytest.mark.parametrize(
        "report",
        [
            m.Started(0),
            m.Started(10**6),
            m.Started(-1),
            m.Prepared(1, 10**9),
            m.Counts(1, {}, {}, 0, 0),
            m.Ready(1, 2**40, m.PROTOCOL),
            m.Ready(1, -1, m.PROTOCOL),
            m.Ready(1, 1, m.PROTOCOL + 1),
        ],
        ids=repr,
    )
    def test_report(self, few: Coordinator, report: m.ToLead) -> None:
        pair, pids = Pair(few), pool.pids()
        send(few.settings, few.settings.report_socket, codec.encode(report))
        pair.assert_same_or_refused()
        pair.assert_same()
        assert pool.pids() == pids, "what a stranger claims must not decide which process is ended"


class Pair:
    """The same network plain and on lanes, with one worker: the first one that is left."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.victim = coordinator.usable()[0]
        torch.manual_seed(0)
        self.plain: nn.Module = Three().double()
        self.fast = on_lanes(copy.deepcopy(self.plain), 1)
        for _ in range(2):
            self.assert_same()

    def assert_same(self) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        for model in (self.plain, self.fast):
            model.zero_grad()
        found, wanted = self.fast(x), self.plain(x)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        found.sum().backward()
        wanted.sum().backward()
        for p, q in zip(self.fast.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **TOLERANCE)

    def assert_same_or_refused(self) -> None:
        for _ in range(3):
            try:
                self.assert_same()
            except MpsrunError:
                self.plain.load_state_dict(self.fast.state_dict())


def send(settings: Config, address: str, *messages: bytes) -> None:
    """Put messages on a socket of the run, as another process of this user could that has read the secret."""
    with zmq.Context() as context:
        socket = _open(context, zmq.PUSH, address, settings.secret_file.read_bytes(), bind=False)
        for message in messages:
            socket.send(message)
        socket.close(2000)
