"""What is checked: each function looks at one thing, and says what it found and what to do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpsrun.checkout import with_package
from mpsrun.config import SOCKET_PATH_LIMIT_BYTES
from mpsrun.doctor.check import Check
from mpsrun.errors import MpsrunError
from mpsrun.launch.hardware import Hardware, detect
from mpsrun.monitor import nvml
from mpsrun.mps import surroundings
from mpsrun.mps.control import Control, ControlError, pipe_dir_in_force
from mpsrun.mps.places import Places

MOST_CLIENTS = 48  # of one server; newer drivers allow more (CUDA MPS documentation, "Client limits")
LEAST_SHM_MIB = 64
_SHM = Path("/dev/shm")  # noqa: S108 - the kernel's own
ROUND_TRIP_S = 90.0
SLOW_US = 20.0
_RUN_SOCKET = "mpsrun/xxxxxxxx/mps/control_privileged"  # the longest path in a run's directory
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_NO_GPU = "not checked, there is no GPU to ask", "run it on a machine with an NVIDIA GPU and its NVML"


@dataclass
class Machine:
    """What several checks need, found once. The GPU is the first one that NVML lists."""

    environ: Mapping[str, str]

    @cached_property
    def hardware(self) -> Hardware:
        return detect(self.environ)

    @cached_property
    def modes(self) -> Sequence[nvml.Mode]:
        return nvml.modes()

    @cached_property
    def reading(self) -> tuple[dict[str, object], str] | str:
        """Return what NVML tells of the GPU, with why there is no GPM; or why NVML tells nothing."""
        if not self.modes:
            try:
                nvml.driver_version()
            except nvml.Unavailable as error:
                return str(error)
            return "NVML lists no GPU"
        try:
            with nvml.session() as pynvml:
                gpu = nvml.Gpu(pynvml, self.modes[0].uuid)
                try:
                    return gpu.read(), gpu.problem
                finally:
                    gpu.close()
        except nvml.Unavailable as error:
            return str(error)

    @cached_property
    def round_trip(self) -> float | str:
        """Return microseconds one way between two processes; or what went wrong."""
        return _round_trip("cuda" if self.hardware.kind == "nvidia" else "cpu")


def _driver(machine: Machine) -> Check:
    try:
        return Check("driver", "ok", f"NVIDIA driver {nvml.driver_version()}")
    except nvml.Unavailable as error:
        if machine.hardware.kind == "nvidia":
            return Check(
                "driver", "warn", str(error), "install the driver's libnvidia-ml, or map it into the container"
            )
    return Check("driver", "fail", "no NVIDIA driver is loaded", "install it; without it mpsrun is for trying only")


def _gpu(machine: Machine) -> Check:
    if machine.hardware.kind != "nvidia":
        fix = "install torch with CUDA on a machine with an NVIDIA GPU, or unset CUDA_VISIBLE_DEVICES"
        return Check("GPU", "fail", machine.hardware.reason, fix)
    if odd := surroundings.wsl() or surroundings.jetson():
        return Check("GPU", "warn", odd.found, odd.fix)
    return Check("GPU", "ok", ", ".join(mode.name for mode in machine.modes) or "an NVIDIA GPU")


def _compute_mode(machine: Machine) -> Check:
    modes = list(machine.modes)
    if blocked := surroundings.prohibited(modes):
        return Check("compute mode", "fail", blocked.found, blocked.fix)
    if exclusive := surroundings.exclusive_process(modes):
        return Check("compute mode", "warn", exclusive.found, exclusive.fix)
    return Check("compute mode", "ok", "default") if modes else Check("compute mode", "warn", *_NO_GPU)


def _mig(machine: Machine) -> Check:
    if cut := surroundings.multi_instance(list(machine.modes)):
        return Check("MIG", "fail", cut.found, cut.fix)
    return Check("MIG", "ok", "off") if machine.modes else Check("MIG", "warn", *_NO_GPU)


def _mps_binaries(_machine: Machine) -> Check:
    if missing := surroundings.missing_binaries():
        return Check("CUDA MPS binaries", "fail", missing.found, missing.fix)
    return Check("CUDA MPS binaries", "ok", str(shutil.which(surroundings.CONTROL)))


def _pipe_directory(machine: Machine) -> Check:
    pipe_dir = pipe_dir_in_force()
    if obstacle := surroundings.first_obstacle_to_joining(pipe_dir):
        is_named = bool(machine.environ.get("CUDA_MPS_PIPE_DIRECTORY"))
        return Check("pipe directory", "fail" if is_named else "warn", obstacle.found, obstacle.fix)
    if Places.user().record() is not None:
        return Check("pipe directory", "ok", f"mpsrun daemon in {Places.user().pipe_dir}")
    if Control(pipe_dir, 2.0).is_reachable():
        return Check("pipe directory", "ok", f"a daemon answers in {pipe_dir}")
    if machine.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        fix = "start that daemon, or unset CUDA_MPS_PIPE_DIRECTORY"
        return Check("pipe directory", "warn", f"no daemon answers in {pipe_dir}, which is named", fix)
    return Check("pipe directory", "ok", "no daemon runs; each run starts one of its own")


def _socket_path(machine: Machine) -> Check:
    runtime = machine.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())
    size_bytes = len(os.fsencode(base.absolute() / _RUN_SOCKET))
    found = f"{size_bytes} of {SOCKET_PATH_LIMIT_BYTES} bytes under {base}"
    if size_bytes <= SOCKET_PATH_LIMIT_BYTES:
        return Check("socket path length", "ok", found)
    return Check(
        "socket path length", "fail", found, "set XDG_RUNTIME_DIR or TMPDIR to a directory with a shorter name"
    )


def _shared_memory(_machine: Machine) -> Check:
    try:
        free_mib = shutil.disk_usage(_SHM).free >> 20
    except OSError as error:
        return Check("shared memory", "fail", f"{_SHM}: {error.strerror}", "mount a tmpfs there")
    if free_mib < LEAST_SHM_MIB:
        fix = "start the container with --ipc=host or --shm-size=1g, or remove what fills it"
        return Check("shared memory", "warn", f"{free_mib} MiB free in {_SHM}", fix)
    return Check("shared memory", "ok", f"{free_mib} MiB free in {_SHM}")


def _ipc(machine: Machine) -> Check:
    what = "GPU memory" if machine.hardware.kind == "nvidia" else "memory"
    if isinstance(machine.round_trip, str):
        fix = "in a container use --ipc=host, and leave PYTORCH_CUDA_ALLOC_CONF alone"
        return Check("IPC", "fail", f"two processes could not share {what}: {machine.round_trip}", fix)
    return Check("IPC", "ok", f"two processes share {what}")


def _memory_operations(machine: Machine) -> Check:
    name, us = "stream memory operations", machine.round_trip
    kind = "cuda" if machine.hardware.kind == "nvidia" else "cpu"
    if isinstance(us, str):
        return Check(name, "fail", us, "update the driver; pip install cuda-bindings")
    if kind == "cpu":
        return Check(name, "warn", f"no GPU; {us:.1f} us one way between two processes on the CPU", _NO_GPU[1])
    if us > SLOW_US:
        return Check(
            name, "warn", f"{us:.1f} us one way", "look for other processes on the GPU, and start mpsrun daemon"
        )
    return Check(name, "ok", f"{us:.1f} us one way")


def _expandable_segments(machine: Machine) -> Check:
    for name in _ALLOCATOR:
        if re.search(r"expandable_segments\s*:\s*true", machine.environ.get(name, ""), re.IGNORECASE):
            fix = f"take expandable_segments out of {name}: such memory cannot be shared with workers"
            return Check("expandable segments", "warn", f"on, by {name}", fix)
    return Check("expandable segments", "ok", "off")


def _client_limit(_machine: Machine) -> Check:
    places = Places.user()
    control = Control(places.pipe_dir if places.record() is not None else pipe_dir_in_force(), 2.0)
    try:
        clients = sum(len(control.client_list(server)) for server in control.server_list())
    except ControlError:
        return Check("client limit", "ok", f"no CUDA MPS runs; a server takes {MOST_CLIENTS}")
    found = f"{clients} of {MOST_CLIENTS} clients"
    if clients > MOST_CLIENTS - 8:
        return Check("client limit", "warn", found, "end clients that are not needed, or use fewer --workers")
    return Check("client limit", "ok", found)


def _clocks(machine: Machine) -> Check:
    if isinstance(machine.reading, str):
        return Check("clocks", "warn", *_NO_GPU)
    values, _ = machine.reading
    found = f"{values['sm_clock_mhz']} of {values['sm_clock_max_mhz']} MHz, {values['temperature_c']} C"
    if slowed := values["slowed_by"]:
        assert isinstance(slowed, tuple)
        return Check("clocks", "warn", f"{found}, slowed by {', '.join(slowed)}", "see to cooling and power limit")
    return Check("clocks", "ok", found)


def _nvml_check(machine: Machine) -> Check:
    if isinstance(machine.reading, str):
        return Check("NVML", "warn", machine.reading, "without it the daemon's status has no memory")
    missing = [name for name in ("memory_used_mib", "slowed_by") if machine.reading[0][name] is None]
    if missing:
        return Check("NVML", "warn", f"it does not tell {', '.join(missing)}", "plans do not adapt to it")
    return Check("NVML", "ok", "tells memory and clocks")


def _gpm(machine: Machine) -> Check:
    if isinstance(machine.reading, str):
        return Check("GPM", "warn", *_NO_GPU)
    if problem := machine.reading[1]:
        return Check("GPM", "warn", problem, "Hopper and later have it; without it saturated SMs are not noticed")
    return Check("GPM", "ok", "tells how busy SMs, tensor cores and memory are")


CHECKS: tuple[Callable[[Machine], Check], ...] = (
    _driver, _gpu, _compute_mode, _mig, _mps_binaries, _pipe_directory, _socket_path, _shared_memory, _ipc,
    _memory_operations, _expandable_segments, _client_limit, _clocks, _nvml_check, _gpm,
)  # fmt: skip


def run_all(environ: Mapping[str, str] | None = None) -> list[Check]:
    """Check everything; a check that itself fails is a line of the table, too."""
    machine = Machine(os.environ if environ is None else environ)
    found = []
    for check in CHECKS:
        try:
            found.append(check(machine))
        except (MpsrunError, OSError) as error:
            found.append(Check(check.__name__.replace("_", " ").strip(), "fail", str(error), "see the message"))
    return found


def _round_trip(kind: str) -> float | str:
    """Run roundtrip.py in processes of its own, which are ended whatever they hang in."""
    command = [sys.executable, "-P", "-m", "mpsrun.doctor.roundtrip", kind]
    environ = with_package(os.environ)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, process_group=0
    ) as process:
        try:
            out, errors = process.communicate(timeout=ROUND_TRIP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"no answer within {ROUND_TRIP_S:g} s"
    if process.returncode == 0:
        return float(out)
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"
