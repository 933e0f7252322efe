"""A terminal with a shell's job control, for tests: `with Terminal(command) as terminal`.

A small shell leads a session on a new pseudo-terminal and runs the command as its foreground job, as an
interactive one does. What it sees of the job (stopped, continued, ended) comes as lines through a pipe.
"""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

SHELL = r"""
import os, signal, subprocess, sys
KEYS = (signal.SIGINT, signal.SIGTTOU)
report = int(sys.argv[1])
for key in KEYS:
    signal.signal(key, signal.SIG_IGN)

def become_job():
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())  # here and not in the shell, so that no key can come before
    for key in KEYS:
        signal.signal(key, signal.SIG_DFL)

job = subprocess.Popen(sys.argv[2:], preexec_fn=become_job)
while True:
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.write(report, b"stopped %d\n" % os.WSTOPSIG(status))
        os.tcsetpgrp(0, os.getpgrp())
        sys.stdin.readline()  # any line is `fg`
        os.tcsetpgrp(0, job.pid)
        os.killpg(job.pid, signal.SIGCONT)
    else:
        os.write(report, b"ended %d\n" % os.waitstatus_to_exitcode(status))
        break
"""


class Terminal:
    def __init__(self, command: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self._report, theirs = os.pipe()
        self.master, slave = pty.openpty()
        self._shell = subprocess.Popen(
            [sys.executable, "-c", SHELL, str(theirs), *command],
            stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env, pass_fds=[theirs],
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        os.close(theirs)
        self.output = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shell.poll() is None:
            self._shell.kill()
        self._shell.wait()
        os.close(self.master)
        os.close(self._report)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def expect(self, text: bytes, timeout_s: float = 15) -> None:
        """Read until the terminal has shown `text`, beyond what an earlier call found."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            rest_s = deadline - time.monotonic()
            assert rest_s > 0, f"expected {text!r}, found {self.output!r}"
            if select.select([self.master], [], [], rest_s)[0]:
                try:
                    self.output += os.read(self.master, 4096)
                except OSError:  # the last process on it has ended
                    raise AssertionError(f"expected {text!r}, found {self.output!r}") from None
        self.output = self.output.partition(text)[2]

    def job(self, timeout_s: float = 15) -> str:
        """The shell's next line about the job: `stopped SIGNAL` or `ended STATUS`."""
        assert select.select([self._report], [], [], timeout_s)[0], f"the job did nothing; {self.output!r}"
        return os.read(self._report, 100).decode().strip()


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
