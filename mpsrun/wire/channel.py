"""The ways between lead and workers: sockets for what is large or rare, a ring for what a step needs.

The only importer of zmq. All sockets of a run speak CurveZMQ with one key pair, made from the run's secret: who does
not know it can neither send nor receive, since not even the public key is told. A socket belongs to the thread that
receives on it; sends to a worker may come from several threads (forward, autograd, the coordinator's own) and are
serialised by the caller's lock.
"""

from __future__ import annotations

import contextlib
import os
import socket as unix
from pathlib import Path

import zmq
from zmq.utils import z85

from mpsrun.errors import MpsrunError
from mpsrun.wire import codec
from mpsrun.wire.messages import Start, ToLead, ToWorker
from mpsrun.wire.ring import Ring

LINGER_MS = 500
RING_TIMEOUT_S = 60.0
SOCKET_TIMEOUT_S = 10.0  # what is on the socket was sent before the ring says so
ON_SOCKET = b""


class WorkerChannel:
    """A worker's end: what the lead says, and the way back. The first message, `Start`, names the ring."""

    def __init__(self, commands: str, reports: str, secret: bytes) -> None:
        self._context = zmq.Context()
        self._commands = _open(self._context, zmq.PULL, commands, secret, bind=True)
        self._reports = _open(self._context, zmq.PUSH, reports, secret, bind=False)
        self._ring: Ring | None = None

    def receive(self, timeout_s: float, spin_s: float = 0.0) -> ToWorker | None:
        """The next message; None after `timeout_s`, of which `spin_s` are spent awake. Raises `BadMessage`."""
        if self._ring is not None:
            data = self._ring.read(timeout_s, spin_s)
            if data is None:
                return None
            if data != ON_SOCKET:
                return codec.decode_to_worker(data)
            return self._announced()
        message = self._from_socket(timeout_s)
        if isinstance(message, Start):
            self._ring = Ring.open(message.ring)
        return message

    def _announced(self) -> ToWorker:
        """The message on the socket that the ring tells of; raises `MpsrunError` where it does not come."""
        message = self._from_socket(SOCKET_TIMEOUT_S)
        if message is None:
            raise MpsrunError(f"expected a message on the socket, found none for {SOCKET_TIMEOUT_S:g} s: it was cut")
        return message

    def _from_socket(self, timeout_s: float) -> ToWorker | None:
        if not self._commands.poll(int(timeout_s * 1000)):
            return None
        return codec.decode_to_worker(self._commands.recv())

    def send(self, message: ToLead) -> None:
        self._reports.send(codec.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        self._commands.close(0)
        self._reports.close(LINGER_MS)
        self._context.term()


class LeadChannel:
    """The lead's end: a socket and a ring to each worker, and the reports of all of them."""

    def __init__(self, commands: list[str], reports: str, secret: bytes) -> None:
        self._context = zmq.Context()
        self._secret = secret
        # The lead connects and the worker binds: what is sent before the worker is there waits for it.
        self._commands = [_open(self._context, zmq.PUSH, address, secret, bind=False) for address in commands]
        self._reports = _open(self._context, zmq.PULL, reports, secret, bind=True)
        self._reports_file: _BoundFile | None = _BoundFile(reports)
        self._rings = [Ring.create() for _ in commands]

    def ring_of(self, worker: int) -> str:
        """Where the ring of worker number `worker`, from 1, can be opened."""
        return self._rings[worker - 1].path

    def renew(self, worker: int, address: str) -> None:
        """Another process takes the place of worker number `worker`: nothing that the last one was sent reaches it."""
        self._commands[worker - 1].close(0)
        self._commands[worker - 1] = _open(self._context, zmq.PUSH, address, self._secret, bind=False)
        self._rings[worker - 1].close()
        self._rings[worker - 1] = Ring.create()

    def receive(self, timeout_s: float) -> ToLead | None:
        """The next report; None after `timeout_s`. Raises `BadMessage`, and once where the socket's file is gone."""
        if timeout_s and self._reports_file is not None and (reason := self._reports_file.lost()):
            self._reports_file = None
            raise MpsrunError(reason)
        if not self._reports.poll(int(timeout_s * 1000)):
            return None
        return codec.decode_to_lead(self._reports.recv())

    def send(self, worker: int, message: ToWorker) -> None:
        """Send over the socket, in order with what goes over the ring. Never blocks."""
        self._commands[worker - 1].send(codec.encode(message), zmq.NOBLOCK)
        if not isinstance(message, Start):
            self._rings[worker - 1].write(ON_SOCKET, RING_TIMEOUT_S)

    def send_step(self, worker: int, message: ToWorker) -> None:
        """Send a small message over the ring. Blocks only where the worker is thousands of messages behind."""
        self._rings[worker - 1].write(codec.encode(message), RING_TIMEOUT_S)

    def unread_bytes(self, worker: int) -> int:
        """How much is in the ring of worker number `worker` that it has not read."""
        return self._rings[worker - 1].unread_bytes

    def close(self) -> None:
        """Deliver what is on its way, with a deadline, and remove the sockets."""
        for socket in self._commands:
            socket.close(LINGER_MS)
        self._reports.close(0)
        self._context.destroy(linger=LINGER_MS)
        while self._rings:
            self._rings.pop().close()


class _BoundFile:
    """The file of a socket that this process has bound; anybody of this user can put another one in its place."""

    def __init__(self, address: str) -> None:
        self._path = _path_of(address)
        self._inode = self._path.stat().st_ino

    def lost(self) -> str:
        """Say what became of the file; empty where it is as it was. Connections that stand are not affected."""
        try:
            inode = self._path.stat().st_ino
        except OSError:
            return (
                f"expected the socket {self._path}, found that it was removed; processes that come now cannot connect"
            )
        if inode == self._inode:
            return ""
        return (
            f"expected the socket {self._path} of this process, found that another process has bound one in its place; "
            "it knows neither the run's secret nor its messages, but processes that come now cannot connect"
        )


def _path_of(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def _open(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, secret: bytes, bind: bool
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, codec.LIMIT_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    try:
        _lock(socket, secret, bind)
        if bind:
            _refuse_second_binder(address)
        (socket.bind if bind else socket.connect)(address)
    except zmq.ZMQError as error:
        context.destroy(linger=0)  # nothing of a channel that could not be opened stays
        raise MpsrunError(f"expected to open the socket {address}, found: {error}") from error
    except MpsrunError:
        context.destroy(linger=0)
        raise
    return socket


def _lock(socket: zmq.Socket[bytes], secret: bytes, bind: bool) -> None:
    """Let only those connect who know the run's secret, and only to those who know it (CurveZMQ, RFC 26)."""
    key = z85.encode(secret)
    public = zmq.curve_public(key)
    socket.setsockopt(zmq.CURVE_SECRETKEY, key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    if bind:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, public)


def _refuse_second_binder(address: str) -> None:
    """Raise where a living process listens there: ZeroMQ would take the address away from it without a word."""
    path = _path_of(address)
    with contextlib.closing(unix.socket(unix.AF_UNIX)) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:  # nobody, or the file of a process that has ended
            return
    raise MpsrunError(f"expected nobody to listen on {path} yet, found another process; end it, and start again")
