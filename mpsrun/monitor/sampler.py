"""The one sampler, a thread of the launcher: it waits until the lead names its GPU, then samples ten times a second.

It costs less than one percent of a core, whatever the driver takes for an answer: it measures its own CPU time, and
samples less often where that would be more.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from mpsrun.config import Config
from mpsrun.log import detail, say
from mpsrun.monitor import nvml
from mpsrun.monitor.page import Writer
from mpsrun.monitor.sample import Sample, Tenant
from mpsrun.monitor.trace import Sampled, Trace

INTERVAL_S = 0.1
PROCESSES_S = 0.5  # who else is there is asked less often: it takes the driver longest where there are many
MOST_OF_A_CORE = 0.008
WAIT_S = 0.25
END_S = 2.0
NO_GPU = "cpu"  # what the lead names where it computes on a CPU
_SERVER = "nvidia-cuda-mps"  # what is left of a server's name in /proc/PID/comm
_MIB = 1 << 20


class Sampler:
    """Samples into `config.sample_page`, and into the trace if there is one, until `close`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ending = threading.Event()
        self._launcher = os.getpid()
        self._asked_s = 0.0  # when processes were asked for last, and what the answer was
        self._others: dict[str, Any] = {}
        self._known: dict[int, bool] = {}  # by pid, whether a process is one of this run or a server of CUDA MPS
        self._thread = threading.Thread(target=self._run, name="mpsrun-monitor", daemon=True)

    def start(self) -> None:
        """Begin to wait for the lead."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; returns when it has ended, or after two seconds."""
        self._ending.set()
        self._thread.join(END_S)

    def _run(self) -> None:
        try:
            while (uuid := self._wait_for_lead()) is not None:
                self._watch(uuid)
        except Exception as error:  # noqa: BLE001 - a monitor that fails must not harm the run
            say(f"the monitor ended ({type(error).__name__}: {error}); plans adapt by step times alone")

    def _wait_for_lead(self) -> str | None:
        while not self._ending.wait(WAIT_S):
            with contextlib.suppress(OSError):
                if uuid := self._config.watched_gpu.read_text().strip():
                    return uuid
        return None

    def _watch(self, uuid: str) -> None:
        with contextlib.ExitStack() as stack:
            page = Writer(self._config.sample_page)
            stack.callback(page.close)
            trace = Trace(self._config.trace) if self._config.trace is not None else None
            if trace is not None:
                stack.callback(trace.close)
            gpu, problem = self._open(stack, uuid)
            self._asked_s = 0.0
            while not self._ending.is_set() and self._config.sample_page.exists():  # gone where the lead starts again
                begin_s = time.thread_time()
                sample, gpu = self._sample(gpu, problem)
                problem = sample.problem
                page.write(sample)
                if trace is not None:
                    trace.add(Sampled(sample))
                self._ending.wait(max(INTERVAL_S, (time.thread_time() - begin_s) / MOST_OF_A_CORE))

    def _open(self, stack: contextlib.ExitStack, uuid: str) -> tuple[nvml.Gpu | None, str]:
        if uuid == NO_GPU:
            return None, "no GPU"
        try:
            gpu = nvml.Gpu(stack.enter_context(nvml.session()), uuid)
        except nvml.Unavailable as error:
            say(f"the GPU is not watched ({error}): plans adapt by step times alone")
            return None, str(error)
        stack.callback(gpu.close)
        if gpu.problem:
            detail(f"{gpu.problem}: how busy SMs and memory are is not known")
        return gpu, gpu.problem

    def _sample(self, gpu: nvml.Gpu | None, problem: str) -> tuple[Sample, nvml.Gpu | None]:
        host: dict[str, Any] = {
            "at_s": time.monotonic(),
            "cpu_percent": psutil.cpu_percent(),
            "host_available_mib": psutil.virtual_memory().available // _MIB,
        }
        if gpu is None:
            return Sample(**host, problem=problem), None
        try:
            return Sample(**host, problem=gpu.problem, **gpu.read(), **self._who(gpu)), gpu
        except nvml.Unavailable as error:
            say(f"{error}; it is no longer watched, plans adapt by step times alone")
            return Sample(**host, problem=str(error)), None

    def _who(self, gpu: nvml.Gpu) -> dict[str, Any]:
        """Our own processes and tenants, as they were half a second ago at most."""
        if time.monotonic() - self._asked_s >= PROCESSES_S:
            self._asked_s, self._others = time.monotonic(), self._split(gpu.processes())
        return self._others

    def _split(self, processes: dict[int, int | None] | None) -> dict[str, Any]:
        """Tell our own processes from tenants."""
        if processes is None:
            return {"own_mib": None, "tenants": None}
        if new := processes.keys() - self._known.keys():
            own = {process.pid for process in psutil.Process(self._launcher).children(recursive=True)}
            self._known.update({pid: pid in own or _is_server(pid) for pid in new})
        self._known = {pid: is_own for pid, is_own in self._known.items() if pid in processes}
        tenants = tuple(Tenant(pid, mib) for pid, mib in sorted(processes.items()) if not self._known[pid])
        return {"own_mib": sum(mib or 0 for pid, mib in processes.items() if self._known[pid]), "tenants": tenants}


@contextlib.contextmanager
def sampling(config: Config, has_gpu: bool) -> Iterator[None]:
    """Sample while the body runs, once the lead asks for it; where nobody will, do nothing."""
    adapts = config.adapt == "on" or (config.adapt == "auto" and has_gpu)
    if config.lanes == "serial" or not (adapts or config.trace is not None):
        yield
        return
    sampler = Sampler(config)
    sampler.start()
    try:
        yield
    finally:
        sampler.close()


def _is_server(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip().startswith(_SERVER)
    except OSError:
        return False
