"""The sockets: one PUSH to each worker, one PULL of reports from all. The only importer of zmq.

A socket belongs to the thread that receives on it; sends to a worker may come from several threads (forward, autograd,
the coordinator's own) and are serialised by the caller's lock.
"""

from __future__ import annotations

import zmq

from mpsrun.errors import MpsrunError
from mpsrun.wire import codec
from mpsrun.wire.messages import ToLead, ToWorker

LINGER_MS = 500


class Sender:
    """Sends typed messages without ever blocking."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, bind: bool) -> None:
        self._socket = _open(context, zmq.PUSH, address, bind)

    def send(self, message: ToWorker | ToLead) -> None:
        self._socket.send(codec.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close(LINGER_MS)


class Receiver:
    """Receives typed messages; every receive has a deadline."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, bind: bool) -> None:
        self._socket = _open(context, zmq.PULL, address, bind)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None once `timeout_s` has passed without one."""
        if not self._socket.poll(timeout_s * 1000):
            return None
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close(0)


class WorkerChannel:
    """A worker's end: what the lead says, and the way back."""

    def __init__(self, commands: str, reports: str) -> None:
        self._context = zmq.Context()
        self._commands = Receiver(self._context, commands, bind=True)
        self._reports = Sender(self._context, reports, bind=False)

    def receive(self, timeout_s: float) -> ToWorker | None:
        """The next message; None after `timeout_s`. Raises `BadMessage`."""
        data = self._commands.receive(timeout_s)
        return None if data is None else codec.decode_to_worker(data)

    def send(self, message: ToLead) -> None:
        self._reports.send(message)

    def close(self) -> None:
        self._commands.close()
        self._reports.close()
        self._context.term()


class LeadChannel:
    """The lead's end: one socket a worker, and the reports of all of them."""

    def __init__(self, commands: list[str], reports: str) -> None:
        self._context = zmq.Context()
        # The lead connects and the worker binds: what is sent before the worker is there waits for it.
        self._senders = [Sender(self._context, address, bind=False) for address in commands]
        self._reports = Receiver(self._context, reports, bind=True)

    def receive(self, timeout_s: float) -> ToLead | None:
        """The next report; None after `timeout_s`. Raises `BadMessage`."""
        data = self._reports.receive(timeout_s)
        return None if data is None else codec.decode_to_lead(data)

    def send(self, worker: int, message: ToWorker) -> None:
        """Send to worker number `worker`, from 1. Never blocks."""
        self._senders[worker - 1].send(message)

    def close(self) -> None:
        """Deliver what is on its way, with a deadline, and remove the sockets."""
        for sender in self._senders:
            sender.close()
        self._reports.close()
        self._context.destroy(linger=LINGER_MS)


def _open(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, bind: bool
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, codec.LIMIT_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    try:
        (socket.bind if bind else socket.connect)(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise MpsrunError(f"expected to open the socket {address}, found: {error}") from error
    return socket
