"""One start of the group: lead and workers from their start to their end, and what failed on the way."""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mpsrun.config import Config
from mpsrun.launch import pulse, signals
from mpsrun.launch.ending import end
from mpsrun.launch.failures import Failure, failure
from mpsrun.launch.keeper import Keeper
from mpsrun.launch.spawn import spawn_lead
from mpsrun.launch.target import Target
from mpsrun.launch.workers import Worker, look_at, workers_of
from mpsrun.log import say
from mpsrun.mps.identity import stat_fields
from mpsrun.mps.service import Service

INTERRUPT_S = 5.0  # what a lead has after a Ctrl-C to get back to Python; to end it takes up to five more
LOST_SERVER_S = 10.0  # what a lead has to notice that its CUDA MPS server is gone
_GRACE_S = 1.0  # for workers which the lead has told to end
_LOOK_AGAIN_S = 5.0  # children announce their ends; this is for an announcement that got lost
_LOOK_SOON_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """How one start of the group went.

    returncode: the lead's exit status, minus the signal that ended it, None where mpsrun ended it. asked: whether
    somebody wanted the end, by a key or a signal to the launcher.
    """

    returncode: int | None
    asked: bool = False
    failures: tuple[Failure, ...] = ()


@dataclass
class Watch:
    """What the launcher has seen of a running group."""

    config: Config
    mps: Service
    keeper: Keeper
    lead: "subprocess.Popen[bytes]"
    workers: list[Worker]
    failures: list[Failure] = field(default_factory=list)
    asked: bool = False
    given_up: bool = False
    _server_lost_s: float | None = None
    _interrupted: pulse.Question | None = None

    def until_end(self) -> Outcome:
        """Pass on signals, and start workers again, until the lead has ended, or has to be ended."""
        while self.lead.poll() is None and not self._is_stuck():
            try:
                stopped = os.waitid(os.P_PID, self.lead.pid, os.WSTOPPED | os.WNOHANG)
            except ChildProcessError:  # it ended just now
                continue
            if stopped is not None:
                signals.stop_with(stopped.si_status)
            self._look()
            self.keeper.look()
            info = signal.sigtimedwait(signals.WATCHED, look_at(self.workers, self._patience_s()))
            if info is not None:
                self._take(info)
        ended_s = time.monotonic()
        self._look()
        return self._outcome(ended_s)

    def _take(self, info: signal.struct_siginfo) -> None:
        self.asked = self.asked or info.si_signo in signals.ENDING
        if info.si_signo == signal.SIGINT and self._interrupted is None:
            self._interrupted = pulse.Question(self.config)
        is_stopped = info.si_signo == signal.SIGCONT and stat_fields(self.lead.pid)[:1] == ["T"]
        if signals.is_for_lead(info, self.lead.pid) or is_stopped:
            self.lead.send_signal(info.si_signo)

    def _look(self) -> None:
        """Note what has ended of CUDA MPS."""
        for role, pid in self.mps.lost():
            at_s = time.monotonic()
            log = self.config.kept_log(self.mps.log)
            self.failures.append(failure(role, pid, None, at_s, self.config.error_file(role), log))
            if role == "CUDA MPS server":  # one that is there serves its clients without the daemon
                self._server_lost_s = self._server_lost_s or at_s
            say(f"the {role} (pid {pid}) has ended; the log is {self.mps.log}")

    def _is_stuck(self) -> bool:
        """Return whether the lead has to be ended: nothing that it waits for will come."""
        if self._server_lost_s is not None and time.monotonic() - self._server_lost_s > LOST_SERVER_S:
            say(f"the script has not ended {LOST_SERVER_S:g} s after its CUDA MPS server: ending it")
            self.given_up = True
        if self._interrupted is not None and self._interrupted.unanswered(INTERRUPT_S):
            say(f"the script has not come back to Python within {INTERRUPT_S:g} s of the interrupt: ending it")
            self.given_up = True
        return self.given_up

    def _patience_s(self) -> float:
        waits = self._server_lost_s is not None or self._interrupted is not None
        return _LOOK_SOON_S if waits else _LOOK_AGAIN_S

    def _outcome(self, ended_s: float) -> Outcome:
        code = None if self.given_up else self.lead.returncode
        for worker in self.workers:
            worker.note_end()
            self.failures += worker.failures
        if code != 0:
            self.failures.append(failure("lead", self.lead.pid, code, ended_s, self.config.error_file("lead")))
        return Outcome(code, self.asked, tuple(self.failures))


def run_group(
    config: Config, target: Target, mps: Service, keeper: Keeper, mask: Collection[int], extra: Mapping[str, str]
) -> Outcome:
    """Run the script in a lead, with workers beside it; all of them have ended on return."""

    def grace_s() -> float:
        return _GRACE_S if config.capture_marker.exists() else 0.0

    with workers_of(config, say, grace_s, mps.release) as workers:
        if early := signal.sigpending() & signals.ENDING:
            return Outcome(-min(early), asked=True)
        lead = spawn_lead(config, target, os.getpid(), mask, extra)
        keeper.lead(lead.pid)
        try:
            return Watch(config, mps, keeper, lead, workers).until_end()
        finally:
            keeper.no_lead()
            end([lead], release=mps.release)
