"""Found by the worker processes of these tests through PYTHONPATH: does in them what a test has ordered.

An order is a file named after a worker and a phase in `MPSRUN_TEST_FAULTS`, with the name of a fault in it. It is taken
away before it is followed, so that the process which takes the worker's place does not follow it, too.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ORDERS = "MPSRUN_TEST_FAULTS"
SOCKET_TIMEOUT_S = 1.0
LINGER_S = 6.0  # more than the watchdog of these tests gives a worker for a first run


def out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("planted: no memory")


def raising() -> None:
    raise RuntimeError("planted: an error")


def spinning() -> None:
    while True:
        pass


def cut() -> None:
    """End the connection on which this worker is told things, and take away the name of the way to another one."""
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        try:
            with socket.socket(fileno=os.dup(number)) as found:
                name = found.getsockname() if found.family == socket.AF_UNIX else ""
                if isinstance(name, str) and "/worker-" in name:
                    Path(name).unlink(missing_ok=True)
                    found.getpeername()  # raises for the socket that listens
                    found.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


FAULTS: dict[str, Callable[[], Any]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exception": raising,
    "exit": lambda: os._exit(3),
    "OOM": out_of_memory,
    "hang": lambda: time.sleep(1e6),
    "spin": spinning,
    "linger": lambda: time.sleep(LINGER_S),
    "cut": cut,
}


def follow(worker: str, phase: str, but: Collection[str] = ()) -> None:
    order = Path(os.environ[ORDERS]) / f"{worker}-{phase}"
    if order.exists() and (fault := order.read_text()) not in but:
        order.unlink()
        FAULTS[fault]()


def install(worker: str) -> None:
    """Look for orders at each phase of a worker's life.

    Within a step they are followed when its work is all but done, but for a lack of memory, which leaves it undone.
    """
    from mpsrun.run.executor import Executor
    from mpsrun.run.worker import Worker
    from mpsrun.wire import channel
    from mpsrun.wire import messages as m

    phases = {m.Start: "start", m.Count: "between", m.Stop: "shutdown"}
    handle = Worker._handle
    follow(worker, "startup")

    def handle_first(self: Worker, message: m.ToWorker) -> None:
        if type(message) in phases:
            follow(worker, phases[type(message)])
        handle(self, message)

    def after(name: str, phase: str) -> None:
        real = getattr(Executor, name)

        def call(*args: Any, **options: Any) -> Any:
            follow(worker, phase, but=FAULTS.keys() - {"OOM"})
            result = real(*args, **options)
            follow(worker, phase)
            return result

        setattr(Executor, name, call)

    Worker._handle = handle_first  # type: ignore[method-assign]
    for name, phase in (
        ("forward", "forward"),
        ("backward", "backward"),
        ("warm_up", "prepare"),
        ("compile", "compile"),
    ):
        after(name, phase)
    channel.SOCKET_TIMEOUT_S = SOCKET_TIMEOUT_S  # type: ignore[misc]


if ORDERS in os.environ and "worker" in sys.orig_argv:
    from mpsrun.launch.on_import import after_import

    after_import("mpsrun.run.worker", lambda: install(sys.orig_argv[sys.orig_argv.index("worker") + 1]))
