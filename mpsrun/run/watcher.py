"""The watching thread of the lead: hears the workers, notices those that are lost, and has their work finished."""

from __future__ import annotations

import builtins
import threading
import time
from collections.abc import Callable, Sequence

import torch

from mpsrun import log
from mpsrun.config import Config
from mpsrun.device import Device
from mpsrun.errors import MpsrunError, WorkerError
from mpsrun.launch.workers import BACK_OFF_S
from mpsrun.run import watchdog
from mpsrun.run.link import SUBMITTED, Link, Replayed, Work
from mpsrun.run.standin import StandIn
from mpsrun.wire import messages as m
from mpsrun.wire.channel import LeadChannel

POLL_S = 0.05
SOUND_S = 5.0  # for a small kernel, behind what the device is at
LINGER_S = 5.0  # for a worker that reported an error to end by itself
COMPILE_S = 900.0  # for one job of a worker
GRACE = 2.0  # the lead's waits outlast the limits here by this factor, so that this thread is what ends them
FIRST_RUN = 2.0  # a job's first run, which loads kernels, may take longer than a later one by this factor


class Watcher:
    """Ends every wait for a worker: whoever waits, waits for its counter, which somebody sets in any case.

    end_worker: ends a process and returns when it is gone. when_started: called once, in a thread of its own, when all
    workers are there or lost. describe: the coordinator's state in one line. `changed` is notified after each report.
    `epoch` counts the workers lost for good, `losses` all that were, `taken_in` those that came back, `shortages` the
    reports of no memory.
    `heirs`: by index, those that were started again and wait to be taken in.
    """

    def __init__(
        self,
        settings: Config,
        device: Device,
        channel: LeadChannel,
        links: Sequence[Link],
        standin: StandIn,
        end_worker: Callable[[int], None],
        when_started: Callable[[], None],
        describe: Callable[[], str],
    ) -> None:
        self.changed = threading.Condition()
        self.epoch = self.losses = self.taken_in = self.shortages = 0
        self.heirs: dict[int, Link] = {}
        self._settings = settings
        self._device = device
        self._channel = channel
        self._links = links
        self._former: list[Link] = []
        self._standin = standin
        self._end_worker = end_worker
        self._when_started: Callable[[], None] | None = when_started
        self._describe = describe
        self._error: Exception | None = None
        self._uncompiled: set[str] = set()  # the reasons that were told
        self._failures: dict[tuple[int, int], Exception] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="mpsrun-watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._closing = True
        self._thread.join(self._settings.timeout_s)

    def took_in(self, former: Link) -> None:
        """Another process has the place of this one now; what this one owes may still grow."""
        self._former.append(former)
        self.taken_in += 1

    def fail(self, error: Exception) -> None:
        """Have the lead raise this at its next crossing."""
        self._error = error

    def check(self) -> None:
        """Raise what could not be raised where it happened: a lost worker under --strict, a failure on a GPU."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_failures(self, pairs: Sequence[tuple[int, int]]) -> list[Exception]:
        """What the work behind these (counter, value) pairs raised, in the worker and in its stand-in."""
        found = [self._failures.pop(pair, None) for pair in pairs]
        return [error for error in found if error is not None]

    def _watch(self) -> None:
        if self._device.kind == "cuda":
            torch.cuda.set_device(self._device.index)  # type: ignore[attr-defined]
            self._standin.warm_up()
        while not self._closing:
            try:
                self._look()
            except MpsrunError as error:  # bytes that are no report
                log.say(f"refused: {error}")
            except Exception as error:  # noqa: BLE001 - the thread that ends every wait must not end itself
                self.fail(MpsrunError(f"mpsrun's watching thread failed: {error!r}"))

    def _look(self) -> None:
        message = self._channel.receive(POLL_S)
        while message is not None:
            self._hear(message)
            message = self._channel.receive(0)
        self._settle()
        if self._when_started is not None and all(link.started or link.lost for link in self._links):
            threading.Thread(target=self._when_started, daemon=True).start()
            self._when_started = None
        for link in self._links:
            self._examine(link)
        self._end_stalls()
        for link in (*self._links, *self._former):
            if link.owed and (link.lost is not None or link.refused):
                self._finish(link)

    def _hear(self, message: m.ToLead) -> None:
        count = len(self._links)
        if not 1 <= message.worker <= count:
            raise MpsrunError(f"expected a report of workers 1 to {count}, found one of {message.worker}")
        link = self._links[message.worker - 1]
        if message.generation != link.generation and not isinstance(message, m.Ready):
            log.detail(f"worker {link.index}: heard {type(message).__name__} of a process that has not its place")
            return
        match message:
            case m.Ready():
                self._welcome(link, message)
            case m.Started():
                link.has_started()
                if link.generation:
                    log.say(f"worker {link.index} is back (pid {link.pid})")
            case m.Prepared():
                link.has_prepared(message.layout)
                self._note_uncompiled(message)
            case m.Recorded():
                link.recorded[message.relay] = message.reason
            case m.NoMemory():
                link.lacks_memory(message)
                self.shortages += 1
                if self._settings.strict:
                    self.fail(torch.OutOfMemoryError(f"in worker {link.index}: {message.text}"))
            case m.Counts():
                link.counts = message
            case m.Failed():
                self._lose(link, f"{message.kind}: {message.text}", message)
        with self.changed:
            self.changed.notify_all()

    def _note_uncompiled(self, message: m.Prepared) -> None:
        """Say once for each reason that a branch could not be compiled."""
        if message.uncompiled is not None and message.uncompiled not in self._uncompiled:
            self._uncompiled.add(message.uncompiled)
            log.say(f"worker {message.worker}: a branch cannot be compiled, it runs as it is ({message.uncompiled})")

    def _welcome(self, link: Link, ready: m.Ready) -> None:
        """A worker is there, or a process that shall take the place of one that is lost."""
        if ready.generation == link.generation:
            link.ready(ready)
            return
        if not link.generation < ready.generation <= self._settings.worker_restarts:
            raise MpsrunError(f"worker {link.index}: expected another generation than {ready.generation}")
        if link.lost is None and (link.pid is None or link.exited()):
            self._lose(link, "its process ended", None)
        earlier = self.heirs.get(link.index)
        expected = earlier is None or (earlier.exited() and earlier.generation < ready.generation)
        if link.lost is None or link.is_last or not expected:
            raise MpsrunError(f"worker {link.index}: expected nobody in its place, found process {ready.pid}")
        heir = Link(link.index, self._channel, link.done, link.progress, ready.generation)
        heir.ready(ready)
        if self._device.is_sound(SOUND_S):
            self.heirs[link.index] = heir
        else:
            heir.dismiss()
            self._give_up(link, "the GPU is not in order")

    def _settle(self) -> None:
        """Forget the work that is done, and restart the clocks of workers that got on or may not start yet."""
        if not any(link.owed for link in self._links):
            return
        counters = self._device.read_counters()
        if counters is None:
            return
        for link in self._links:
            if link.lost is None:
                link.settle(counters, self._device.kind == "cuda")

    def _examine(self, link: Link) -> None:
        if link.lost is not None:
            self._see_off(link)
            if not link.is_last:
                self._expect_heir(link)
        elif link.exited():
            self._lose(link, f"process {link.pid} ended", None)
        elif link.is_late(self._settings.start_s):
            self._lose(link, "it did not start", None)

    def _see_off(self, link: Link) -> None:
        """End a lost process that does not end by itself: it keeps memory, and nobody gets its place before that."""
        if link.pid is None or link.is_ended or time.monotonic() - link.lost_s < LINGER_S:
            return
        link.is_ended = True
        if not link.exited():
            self._end_worker(link.pid)

    def _expect_heir(self, link: Link) -> None:
        heir = self.heirs.get(link.index)
        if heir is None:
            if time.monotonic() - link.lost_s > self._settings.start_s + sum(BACK_OFF_S):
                self._give_up(link, "no process took its place")
        elif heir.exited() and self.heirs.pop(link.index, None) is heir:  # and was not taken in just now
            heir.dismiss()
            if heir.generation >= self._settings.worker_restarts:
                self._give_up(link, f"process {heir.pid}, which was to take its place, ended")

    def _end_stalls(self) -> None:
        """What a worker owes for too long is somebody else's to do, and it is not waited for any longer."""
        limit_s = self._settings.timeout_s
        stalled = [
            link
            for link in self._links
            if link.lost is None and (link.stalled_s() > limit_s or link.preparing_s() > self._first_run_s(link))
        ]
        if stalled:
            names = ", ".join(f"worker {link.index}" for link in stalled)
            self.report(f"no answer from {names} within {limit_s:g} s")
        for link in stalled:
            self._lose(link, f"no answer for {limit_s:g} s", None)
            if link.pid is not None:
                link.is_ended = True
                self._end_worker(link.pid)

    def _first_run_s(self, link: Link) -> float:
        """For how long a worker may prepare one layout."""
        return max(COMPILE_S if link.compiles else 0.0, FIRST_RUN * self._settings.timeout_s)

    def report(self, reason: str) -> None:
        """Tell all that is known of every process, before any of them is ended."""
        counters = self._device.read_counters(wait=self._device.kind == "cpu")
        watchdog.tell(self._settings, reason, self._links, counters, self._describe())

    def _lose(self, link: Link, reason: str, failure: m.Failed | None) -> None:
        if link.lost is not None:
            return
        link.lost_s = time.monotonic()
        link.is_last = link.generation >= self._settings.worker_restarts
        link.lost = reason  # without the coordinator's lock, whose holder may be waiting for this very worker
        self.losses += 1
        outlook = "it is started again, and until then its work is done here"
        if link.is_last:
            self.epoch += 1
            outlook = "the run goes on without it"
        if self._settings.strict:
            outlook = "the script ends, as --strict asks"
        details = f"\n{failure.traceback}" if failure is not None else ""
        log.say(f"worker {link.index} is out: {reason}; {outlook}{details}")
        if self._settings.strict:
            self.fail(as_lead_error(link.index, reason, failure))
        with self.changed:
            self.changed.notify_all()

    def _give_up(self, link: Link, reason: str) -> None:
        """Nobody will take the place of this worker."""
        link.is_last = True
        self.epoch += 1
        log.say(f"worker {link.index} stays out: {reason}; the run goes on without it")

    def _finish(self, link: Link) -> None:
        """Have the stand-in do what a worker does not do; what it had done before must not be done again."""
        counters = self._device.read_counters(wait=True)
        if counters is not None:
            link.settle(counters, self._device.kind == "cuda")
        elif self._device.kind == "cuda":
            return
        submitted = None if counters is None or self._device.kind == "cpu" else counters[SUBMITTED]
        self._standin.finish(link, submitted, self._fail_work)

    def _fail_work(self, link: Link, work: Work | Replayed, error: Exception) -> None:
        """Have whoever waits for this work raise; on a GPU nobody does, so that the next crossing raises."""
        if self._device.kind == "cpu":
            self._failures[link.done, work.seq] = error
        else:
            self.fail(error)


def as_lead_error(worker: int, reason: str, failure: m.Failed | None) -> Exception:
    """A worker's exception as one of the lead: the same type where it is a builtin or torch's, with its traceback."""
    if failure is None:
        return WorkerError(f"worker {worker} is out: {reason}")
    text = f"{failure.text}\n\nin worker {worker}:\n{failure.traceback}"
    kind = getattr(builtins, failure.kind, None) or getattr(torch, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # a type that wants more than a text
            return WorkerError(f"{failure.kind}: {text}")
    return WorkerError(f"{failure.kind}: {text}")
