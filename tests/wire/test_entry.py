"""Who does not know the secret of a run gets no word in and none out, and who takes a socket's place is noticed."""

import random
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from mpsrun.device import CpuDevice
from mpsrun.errors import MpsrunError
from mpsrun.wire import codec
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel, WorkerChannel, _open
from mpsrun.wire.ring import Ring

SECRET = bytes(range(32))
OTHER = bytes(32)
FRAMES = 5000


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('s')}"


@pytest.fixture
def pair(place: str) -> Iterator[tuple[LeadChannel, WorkerChannel]]:
    lead = LeadChannel([f"{place}/w"], f"{place}/r", SECRET)
    worker = WorkerChannel(f"{place}/w", f"{place}/r", SECRET)
    yield lead, worker
    worker.close()
    lead.close()


def assert_understood(pair: tuple[LeadChannel, WorkerChannel]) -> None:
    lead, worker = pair
    lead.send(1, m.Count())
    assert worker.receive(5.0) == m.Count()
    worker.send(m.Started(1))
    assert lead.receive(5.0) == m.Started(1)


def test_both_know_it(pair: tuple[LeadChannel, WorkerChannel]) -> None:
    assert_understood(pair)


@pytest.mark.parametrize("key", [None, OTHER], ids=["no key", "another key"])
def test_a_stranger_sends_nothing(pair: tuple[LeadChannel, WorkerChannel], place: str, key: bytes | None) -> None:
    with zmq.Context() as context:
        for name in ("w", "r"):
            if key is None:
                stranger = context.socket(zmq.PUSH)
                stranger.connect(f"{place}/{name}")
            else:
                stranger = _open(context, zmq.PUSH, f"{place}/{name}", key, bind=False)
            stranger.send(codec.encode(m.Stop() if name == "w" else m.Failed(1, "x", "x", "x")))
            time.sleep(0.2)
            stranger.close(0)
    assert_understood(pair)
    assert pair[0].receive(0) is None
    assert pair[1].receive(0) is None


def test_a_stranger_who_listens_hears_nothing(place: str) -> None:
    """It has bound the worker's address first: what the lead sends stays with the lead."""
    with zmq.Context() as context:
        stranger = context.socket(zmq.PULL)
        stranger.bind(f"{place}/w")
        lead = LeadChannel([f"{place}/w"], f"{place}/r", SECRET)
        lead.send(1, m.Unmap([1]))
        assert not stranger.poll(500)
        lead.close()
        stranger.close(0)


def test_a_second_binder_is_refused(pair: tuple[LeadChannel, WorkerChannel], place: str) -> None:
    for make in (
        lambda: WorkerChannel(f"{place}/w", f"{place}/r", SECRET),
        lambda: LeadChannel([], f"{place}/r", SECRET),
    ):
        with pytest.raises(MpsrunError, match="found another process"):
            make()
    assert_understood(pair)


def test_the_file_of_a_dead_process_is_no_binder(place: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{place.removeprefix('ipc://')}/r")
    LeadChannel([], f"{place}/r", SECRET).close()


def test_a_socket_in_its_place_is_told_once(pair: tuple[LeadChannel, WorkerChannel], place: str) -> None:
    lead, _ = pair
    assert_understood(pair)
    path = Path(f"{place.removeprefix('ipc://')}/r")
    path.rename(path.with_name("moved"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        with pytest.raises(MpsrunError, match="another process has bound one in its place"):
            lead.receive(0.01)
        assert_understood(pair)


def test_a_removed_socket_is_told_once(pair: tuple[LeadChannel, WorkerChannel], place: str) -> None:
    lead, _ = pair
    assert_understood(pair)
    Path(f"{place.removeprefix('ipc://')}/r").unlink()
    with pytest.raises(MpsrunError, match="was removed"):
        lead.receive(0.01)
    assert_understood(pair)


def test_hostile_frames(pair: tuple[LeadChannel, WorkerChannel], place: str) -> None:
    """Noise below ZeroMQ, on both sockets: connections that speak no protocol, half of one, or too much of it."""
    assert_understood(pair)
    for frame in frames(FRAMES // 2):
        for name in ("w", "r"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(f"{place.removeprefix('ipc://')}/{name}")
                try:
                    connection.sendall(frame)
                except OSError:  # thrown out in the middle of it
                    continue
    assert_understood(pair)


def test_hostile_messages() -> None:
    """Frames that do arrive: each is a message of the protocol, or refused as `BadMessage`, nothing else."""
    read = refused = 0
    for frame in frames(FRAMES):
        for decode in (codec.decode_to_worker, codec.decode_to_lead):
            try:
                decode(frame)
                read += 1
            except codec.BadMessage:
                refused += 1
    assert read + refused == 2 * FRAMES
    assert refused > FRAMES


def frames(count: int) -> Iterator[bytes]:
    """Noise, greetings of ZeroMQ that go wrong, and real messages with bytes changed, cut off or repeated."""
    generator = random.Random(0)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE".ljust(22, b"\0") + bytes(33)
    real = [codec.encode(message) for message in (m.Stop(), m.Unmap([1, 2]), m.Started(1), m.Prepared(1, 2), m.Count())]
    for index in range(count):
        source = bytearray((generator.randbytes(generator.randrange(200)), greeting, generator.choice(real))[index % 3])
        for _ in range(generator.randrange(4)):
            if source:
                source[generator.randrange(len(source))] = generator.randrange(256)
        cut = generator.randrange(len(source) + 1) if generator.random() < 0.3 else len(source)
        yield bytes(source[:cut]) * generator.choice((1, 1, 1, 2)) + generator.randbytes(
            generator.choice((0, 0, 9, 300))
        )


def test_shared_memory_is_for_this_user_alone() -> None:
    ring, chunk = Ring.create(), CpuDevice().new_chunk(4096)
    for path in (ring.path, chunk.handle.token.decode()):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
