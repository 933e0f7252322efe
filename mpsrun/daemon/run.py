"""The daemon itself, in the foreground: does what states.py decides, and takes down what it sees.

Health is identity: control daemon and servers are known by pid and start time. The control daemon is asked from time
to time only, by nobody else meanwhile, which servers and clients there are.
"""

import contextlib
import os
import signal
import subprocess
import time

import psutil

from mpsrun.daemon import logs, states
from mpsrun.daemon.notify import notify
from mpsrun.daemon.settings import Settings
from mpsrun.errors import UsageError
from mpsrun.log import last_line, say
from mpsrun.mps.control import CONTROL, LOG_DIRECTORY, PIPE_DIRECTORY, SERVER, Control, ControlError
from mpsrun.mps.identity import Identity, command_of, strings_of
from mpsrun.mps.places import Client, Places, Record

CONTROL_LOG = "control-daemon.log"  # what the control daemon prints, beside the control.log that it writes itself
LOGS = ("control.log", "server.log", CONTROL_LOG, "daemon.log")
COMMAND_S = 2.0
LOOK_S = 1.0  # between two looks at servers and clients
ASK_S = 0.1  # between two questions to a control daemon that is starting
ROTATE_S = 10.0
TICK_S = 0.2
QUIT_S = 5.0
_NOT_PASSED_ON = {
    "CUDA_VISIBLE_DEVICES", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
}  # fmt: skip
_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def run(places: Places, settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns 0. Raises UsageError where another daemon of these places runs."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _END | {signal.SIGCHLD})
    places.make()
    lock = places.take()
    if lock is None:
        raise UsageError(f"expected no daemon for {places.runtime_dir}, found {_who(places)}; see mpsrun daemon status")
    try:
        _Daemon(places, settings, mask).run()
    finally:
        places.record_file.unlink(missing_ok=True)
        os.close(lock)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return 0


class _Daemon:
    def __init__(self, places: Places, settings: Settings, mask: set[int | signal.Signals]) -> None:
        self._places = places
        self._settings = settings
        self._mask = mask
        self._control = Control(places.pipe_dir, COMMAND_S)
        self._process: subprocess.Popen[bytes] | None = None  # a control daemon that is our child
        self._identity: Identity | None = None  # of the control daemon, also of one that was adopted
        self._servers: tuple[Identity, ...] = ()
        self._clients: tuple[Client, ...] = ()
        self._looked_s = self._rotated_s = 0.0
        self._is_configured = False
        self._error = ""
        self._state = states.State()
        self._phase_since_s = time.time()

    def run(self) -> None:
        """Do a tick at least five times a second, until a signal asks for the end."""
        self._adopt()
        self._write()
        while (info := signal.sigtimedwait(_END | {signal.SIGCHLD}, TICK_S)) is None or info.si_signo not in _END:
            self._tick()
        self._stop()

    def _adopt(self) -> None:
        """Take over the control daemon that an earlier daemon, which was killed, has left."""
        left = self._places.last_record()
        if left is None:
            return
        self._servers, self._clients = left.servers, left.clients
        if left.control is not None and left.control.lives:
            say(f"found the control daemon of an earlier daemon (pid {left.control.pid}), and goes on with it")
            self._identity, self._is_configured = left.control, True
            self._state = states.adopted(time.monotonic())

    def _tick(self) -> None:
        before = self._state
        self._state, actions = states.advance(before, self._facts())
        for action in actions:
            self._do(action)
        if self._state.phase != before.phase or self._state.faults != before.faults:
            self._phase_since_s = time.time()
            self._write()
            self._notify(before.phase)
        now_s = time.monotonic()
        if now_s - self._rotated_s > ROTATE_S:
            self._rotated_s = now_s
            paths = [self._places.log_dir / name for name in LOGS]
            logs.rotate(paths, self._settings.log_max_mib << 20, self._settings.log_keep)
        notify("WATCHDOG=1")

    def _facts(self) -> states.Facts:
        lives = self._control_lives()
        ended = tuple(server.pid for server in self._servers if not server.lives)
        self._servers = tuple(server for server in self._servers if server.lives)
        self._clients = tuple(client for client in self._clients if client.process.lives)
        orphans_busy = not lives and any(server.pid in {c.server for c in self._clients} for server in self._servers)
        answers = self._ask() if lives and self._is_time_to_ask() else None
        return states.Facts(time.monotonic(), lives, answers, ended, orphans_busy, self._error)

    def _control_lives(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self._error = last_line(self._places.log_dir / CONTROL_LOG)
            self._process = None
        if self._identity is not None and not self._identity.lives:
            self._identity = None
            self._servers += tuple(server for server in self._unseen_servers() if server not in self._servers)
        return self._identity is not None

    def _unseen_servers(self) -> list[Identity]:
        """Return the servers of this pipe directory; one may have come since the last look at a daemon now dead."""
        wanted = f"{PIPE_DIRECTORY}={self._places.pipe_dir}"
        found = [process.pid for process in psutil.process_iter() if SERVER in command_of(process.pid)]
        ours = (Identity.of(pid) for pid in found if wanted in strings_of(pid, "environ"))
        return [server for server in ours if server is not None]

    def _is_time_to_ask(self) -> bool:
        pause_s = ASK_S if self._state.phase == "starting" else LOOK_S
        return time.monotonic() - self._looked_s > pause_s

    def _ask(self) -> bool:
        """Ask which servers and clients there are; before the first time, hand over the settings."""
        self._looked_s = time.monotonic()
        try:
            self._configure()
            servers = [found for pid in self._control.server_list() if (found := Identity.of(pid)) is not None]
            clients = [
                Client(process, server.pid)
                for server in servers
                for pid in self._control.client_list(server.pid)
                if (process := Identity.of(pid)) is not None
            ]
        except ControlError as error:
            self._error = str(error)
            return False
        if (tuple(servers), tuple(clients)) != (self._servers, self._clients):
            self._servers, self._clients = tuple(servers), tuple(clients)
            self._write()
        return True

    def _configure(self) -> None:
        if self._is_configured:
            return
        self._control.server_list()  # whether it listens at all
        if self._settings.active_thread_percentage != 100:
            self._control.set_default_share(self._settings.active_thread_percentage)
        for device, limit in self._settings.memory_limits().items():
            self._control.set_default_memory_limit(device, limit)
        self._is_configured = True

    def _do(self, action: states.Action) -> None:
        match action:
            case states.Tell(line):
                say(line)
            case states.Start():
                self._start()
            case states.Kill():
                self._kill_control()
            case states.KillOrphans():
                for server in self._servers:
                    server.signal(signal.SIGKILL)
                self._servers = self._clients = ()

    def _start(self) -> None:
        self._clear_pipe_dir()
        self._is_configured, self._error = False, ""
        try:
            with (self._places.log_dir / CONTROL_LOG).open("ab") as log:
                self._process = subprocess.Popen(
                    [CONTROL, "-f"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, self._mask),  # noqa: PLW1509
                )
        except OSError as error:
            self._error, self._identity = f"{error.strerror}: {CONTROL}", None
            return
        self._identity = Identity.of(self._process.pid)

    def _environment(self) -> dict[str, str]:
        """Limits come from the settings alone. So do GPUs: clients that select by number would select a second time."""
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        if self._settings.gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(self._settings.gpus)
        return {**environ, PIPE_DIRECTORY: str(self._places.pipe_dir), LOG_DIRECTORY: str(self._places.log_dir)}

    def _kill_control(self) -> None:
        if self._identity is not None:
            self._identity.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _stop(self) -> None:
        """End control daemon and servers; what does not end when asked is killed."""
        self._state = states.stopping(self._state, time.monotonic())
        self._write()
        notify("STOPPING=1")
        if self._control_lives():
            with contextlib.suppress(ControlError):
                self._control.quit()
            self._wait_for([self._identity, *self._servers])
            self._kill_control()
        for server in self._servers:
            server.signal(signal.SIGKILL)
        self._clear_pipe_dir()

    def _clear_pipe_dir(self) -> None:
        for left in self._places.pipe_dir.iterdir():
            with contextlib.suppress(OSError):  # what is no file there is none of ours
                left.unlink()

    def _wait_for(self, processes: "list[Identity | None]") -> None:
        deadline = time.monotonic() + QUIT_S
        while time.monotonic() < deadline:
            self._control_lives()  # reaps it
            if not any(process is not None and process.lives for process in processes):
                return
            time.sleep(0.02)

    def _write(self) -> None:
        me = Identity.of(os.getpid())
        assert me is not None, "this process lives"
        self._places.write(
            Record(
                daemon=me,
                phase=self._state.phase,
                since_s=self._phase_since_s,
                control=self._identity if self._control_lives() else None,
                servers=self._servers,
                clients=self._clients,
                faults=self._state.faults,
                why=self._state.why or self._error,
            )
        )

    def _notify(self, before: str) -> None:
        phase = self._state.phase
        if phase == "ready" and before != "ready":
            notify("READY=1", "STATUS=ready")
        else:
            notify(f"STATUS={phase}: {self._state.why}")


def _who(places: Places) -> str:
    record = places.last_record()
    return f"pid {record.daemon.pid}" if record is not None else "one that is just starting"
