"""What keeps CUDA MPS from working here, recognised before anything is started, with what to do about it."""

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from mpsrun.monitor import nvml
from mpsrun.mps.control import CONTROL, SERVER

_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_CONTROL_PID = "nvidia-cuda-mps-control.pid"  # written by the control daemon into its pipe directory


@dataclass(frozen=True)
class Obstacle:
    """What is in the way: what was found, what to do."""

    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.found}; {self.fix}"


def missing_binaries() -> Obstacle | None:
    """Recognise an installation of the driver without its compute tools."""
    missing = [name for name in (CONTROL, SERVER) if shutil.which(name) is None]
    if CONTROL not in missing:  # the server may stand elsewhere: the control daemon has its own idea
        return None
    return Obstacle(f"no {CONTROL} on PATH", "install the NVIDIA driver's compute tools (nvidia-compute-utils)")


def wsl(root: Path = Path("/")) -> Obstacle | None:
    """Recognise the Windows Subsystem for Linux, whose driver has no CUDA MPS."""
    release = _text(root / "proc/sys/kernel/osrelease").lower()
    if "microsoft" not in release and not (root / "dev/dxg").exists():
        return None
    return Obstacle("WSL, whose driver has no CUDA MPS", "use Linux itself, or leave workers out: --lanes streams")


def jetson(root: Path = Path("/")) -> Obstacle | None:
    """Recognise an integrated GPU, between whose processes the driver shares no memory."""
    is_tegra = (root / "etc/nv_tegra_release").exists()
    if not is_tegra and "jetson" not in _text(root / "proc/device-tree/model").lower():
        return None
    return Obstacle("a Jetson, whose integrated GPU shares no memory between processes", "use --lanes streams")


def multi_instance(gpus: "list[nvml.Mode] | None" = None) -> Obstacle | None:
    """Recognise a GPU that is cut into instances (MIG), of which a CUDA MPS daemon serves the one that it is given."""
    if not any(gpu.is_mig for gpu in (nvml.modes() if gpus is None else gpus)):
        return None
    return Obstacle(
        "a GPU in MIG mode",
        'name one instance of `nvidia-smi -L` as gpus = ["MIG-..."] in the settings of `mpsrun daemon` and start it, '
        "or turn MIG off: sudo nvidia-smi -mig 0",
    )


def exclusive_process(gpus: "list[nvml.Mode] | None" = None) -> Obstacle | None:
    """Recognise a GPU that only one process may use, which is the CUDA MPS server where there is one."""
    if not any(gpu.compute == "exclusive process" for gpu in (nvml.modes() if gpus is None else gpus)):
        return None
    return Obstacle(
        "a GPU in exclusive-process mode, which without CUDA MPS takes one process only",
        "use CUDA MPS, or sudo nvidia-smi -c DEFAULT, or --lanes serial",
    )


def prohibited(gpus: "list[nvml.Mode] | None" = None) -> Obstacle | None:
    """Recognise a GPU that takes no process at all."""
    if not any(gpu.compute == "prohibited" for gpu in (nvml.modes() if gpus is None else gpus)):
        return None
    return Obstacle("a GPU in compute mode prohibited", "sudo nvidia-smi -c DEFAULT")


def foreign_owner(pipe_dir: Path) -> Obstacle | None:
    """Recognise a daemon of another user; root's serves everybody."""
    try:
        owner = (pipe_dir / "control").stat().st_uid
    except OSError:
        return None
    if owner in (0, os.getuid()):
        return None
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    return Obstacle(
        f"the CUDA MPS daemon in {pipe_dir} belongs to user {name}, and serves that user only",
        "unset CUDA_MPS_PIPE_DIRECTORY, or have root run the daemon",
    )


def other_namespace(pipe_dir: Path, root: Path = Path("/")) -> Obstacle | None:
    """Recognise a container that sees a daemon's directory, but neither its processes nor its shared memory."""
    if not any((root / mark.lstrip("/")).exists() for mark in _CONTAINER_MARKS):
        return None
    pid = _text(pipe_dir / _CONTROL_PID).strip()
    if not pid.isdigit() or CONTROL.startswith(_text(root / f"proc/{pid}/comm").strip() or "?"):
        return None
    return Obstacle(
        f"a container without the IPC and PID namespaces of the CUDA MPS daemon in {pipe_dir}",
        "start the container with --ipc=host --pid=host, or unset CUDA_MPS_PIPE_DIRECTORY for a daemon of its own",
    )


def first_obstacle_to_daemon(has_gpus_chosen: bool) -> Obstacle | None:
    """What keeps a daemon of our own from working here; with GPUs chosen, one of them may be an instance."""
    return wsl() or jetson() or missing_binaries() or prohibited() or (None if has_gpus_chosen else multi_instance())


def first_obstacle_to_joining(pipe_dir: Path) -> Obstacle | None:
    """What keeps us from being clients of the daemon in `pipe_dir`."""
    return foreign_owner(pipe_dir) or other_namespace(pipe_dir)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""
