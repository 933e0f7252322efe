"""Whether the lead can still be interrupted: asked by the launcher after a Ctrl-C, answered by the main thread.

A script may catch KeyboardInterrupt, save for minutes, and go on; that is its own business. But where its main thread
hangs in a call of C, nothing of that happens, and it would stay for as long as the call. So a thread of the lead, which
waits in read(2), has the main thread make a file as soon as it runs Python again. A script that handles SIGINT itself
may sleep through it, and is left alone.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

from mpsrun.config import Config

_callbacks: list[object] = []  # what C may still call


class Question:
    """The launcher's side: asked when it is made, where the lead has somebody to answer."""

    def __init__(self, config: Config) -> None:
        self._answer = config.pulse_answer
        self._asked_s = time.monotonic()
        self._is_heard = _write(config.pulse_fifo)

    def unanswered(self, patience_s: float) -> bool:
        """Return whether the main thread has had `patience_s` and has run no Python."""
        return self._is_heard and time.monotonic() - self._asked_s > patience_s and not self._answer.exists()


def answer_questions(config: Config) -> None:
    """Have the launcher's questions answered from now on, if there is a launcher; called in the lead."""
    if config.run_dir is None or config.pulse_fifo.exists():
        return
    try:
        os.mkfifo(config.pulse_fifo, 0o600)
        pipe = os.open(config.pulse_fifo, os.O_RDWR | os.O_CLOEXEC)  # with a writer of our own it never ends
    except OSError:  # a full disk: nobody asks, and a Ctrl-C is as under `python`
        return
    threading.Thread(target=_listen, args=(pipe, config.pulse_answer), name="mpsrun-pulse", daemon=True).start()


def _write(fifo: Path) -> bool:
    try:
        pipe = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no mpsrun in this lead yet
        return False
    os.write(pipe, b"?")
    os.close(pipe)
    return True


def _listen(pipe: int, answer: Path) -> None:
    def touch(_: object) -> int:
        answer.touch()
        return 0

    callback = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(touch)
    _callbacks.append(callback)
    while os.read(pipe, 1):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            answer.touch()
        else:
            ctypes.pythonapi.Py_AddPendingCall(callback, None)
