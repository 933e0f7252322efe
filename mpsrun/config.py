"""The one configuration of a run: every option, path and socket address is a field or a property of it."""

import functools
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from mpsrun.errors import MpsrunError, UsageError

ENV_CONFIG = "MPSRUN_CONFIG"
# `sockaddr_un.sun_path` has 108 bytes on Linux and 104 on macOS, the closing zero included.
SOCKET_PATH_LIMIT_BYTES = 100
AUTO_WORKERS = 4
MAX_WORKERS = 64
START_S = 60.0
STACKS_SIGNAL = signal.SIGUSR1  # has a worker write the Python stack of each of its threads into its log
REPORTED = 70  # exit status of a worker that told the lead why it ends (EX_SOFTWARE of sysexits.h)

Lanes = Literal["auto", "serial", "streams", "captured", "workers", "captured-workers"]
WORKER_LANES = "auto", "workers", "captured-workers"  # those of the lanes for which there are workers
Switch = Literal["auto", "on", "off"]
Capture = Literal["auto", "off"]
Explain = Literal["", "text", "json"]


@dataclass(frozen=True)
class Config:
    """What the user asked for, and where this run lives.

    workers: worker processes, None for auto. timeout_s: the watchdog of every wait. worker_restarts: how often each
    worker is started again. verify: calls on lanes that are compared with plain PyTorch, by network and plan. plan,
    save_plan: files to read plans from and to write them to.
    explain: the form in which the networks are explained, if at all; steps: after which the script is stopped then.
    max_restarts: how often the script is started again after a failure.
    adapt: whether plans change when the load of the GPU does; auto: where there is a GPU. trace: file that takes what
    was sampled and decided.
    worker_share: the percentage of the GPU's multiprocessors that CUDA MPS lets each worker have, None for all.
    channels_last: whether captured plans keep images so: auto tries one that does where convolutions use tensor cores.
    tune_convolutions: whether cuDNN may choose other algorithms than the script lets it.
    compile_branches: whether workers may have Inductor compile their branches.
    run_dir: the private directory of this run, None before the launcher made it and where there is no launcher.
    """

    workers: int | None = None
    lanes: Lanes = "auto"
    mps: Switch = "auto"
    capture: Capture = "auto"
    log_dir: Path | None = None
    verbose: bool = False
    strict: bool = False
    timeout_s: float = 30.0
    worker_restarts: int = 3
    verify: int = 0
    plan: Path | None = None
    save_plan: Path | None = None
    explain: Explain = ""
    steps: int = 120
    max_restarts: int = 0
    adapt: Switch = "auto"
    trace: Path | None = None
    worker_share: int | None = None
    channels_last: Switch = "auto"
    tune_convolutions: bool = False
    compile_branches: bool = False
    run_dir: Path | None = None

    def worker_count(self) -> int:
        """Return how many worker processes this run has; none where other lanes are forced, else at least one."""
        if self.lanes not in WORKER_LANES:
            return 0
        if self.workers is not None:
            return self.workers
        return max(1, min(AUTO_WORKERS, available_cores() - 1))

    @property
    def report_socket(self) -> str:
        """Address on which the lead receives reports."""
        return socket_address(self._in_run_dir("report"))

    def worker_socket(self, index: int, generation: int = 0) -> str:
        """Address on which worker `index` (from 1) receives control messages.

        A process that takes the place of an earlier one has another: what is on the way to that one must not reach it.
        """
        return socket_address(self._in_run_dir(f"worker-{index}.{generation}" if generation else f"worker-{index}"))

    def worker_log(self, index: int) -> Path:
        """File which takes stdout and stderr of worker `index` (from 1)."""
        name = f"worker-{index}.log"
        return self.log_dir / name if self.log_dir is not None else self._in_run_dir(name)

    def kept_log(self, log: Path | None) -> Path | None:
        """The same, if it is still there when the run is over."""
        return log if log is None or self.run_dir is None or self.run_dir not in log.parents else None

    def error_file(self, role: str) -> Path:
        """File in which the process `role` ("lead", "worker 1") leaves what ended it."""
        return self._in_run_dir(f"error-{role.replace(' ', '-')}.json")

    @property
    def secret_file(self) -> Path:
        """File with the secret that lead and workers of this run share."""
        return self._in_run_dir("secret")

    @property
    def pulse_fifo(self) -> Path:
        """Pipe on which the launcher asks whether the lead's main thread gets to run Python."""
        return self._in_run_dir("pulse")

    @property
    def pulse_answer(self) -> Path:
        """File which the lead's main thread makes when it was asked so."""
        return self._in_run_dir("pulse-answer")

    @property
    def watchdog_log(self) -> Path | None:
        """File which takes the reports of the watchdog; None where nothing is to be kept."""
        return self.log_dir / "watchdog.log" if self.log_dir is not None else None

    @property
    def mps_pipe_dir(self) -> Path:
        """CUDA_MPS_PIPE_DIRECTORY of a CUDA MPS daemon private to this run."""
        return self._in_run_dir("mps")

    @property
    def mps_log_dir(self) -> Path:
        """CUDA_MPS_LOG_DIRECTORY of a CUDA MPS daemon private to this run."""
        return self.log_dir if self.log_dir is not None else self._in_run_dir("mps-log")

    @property
    def watched_gpu(self) -> Path:
        """File in which the lead names its GPU to the monitor, by UUID, once it has one."""
        return self._in_run_dir("gpu")

    @property
    def sample_page(self) -> Path:
        """File with the monitor's latest sample, which the lead maps."""
        return self._in_run_dir("sample")

    @property
    def plan_cache_dir(self) -> Path:
        """Directory of the plans that were found to be the fastest, which all runs of a user share."""
        import platformdirs

        return platformdirs.user_cache_path("mpsrun") / "plans"

    @property
    def capture_marker(self) -> Path:
        """File which the lead makes once the script uses torch, so that workers may hear from it."""
        return self._in_run_dir("torch")

    @property
    def closing_marker(self) -> Path:
        """File which the lead makes before it has the workers end, so that nobody starts them again."""
        return self._in_run_dir("closing")

    @property
    def start_s(self) -> float:
        """What a worker may take from its start until it is there: it imports torch, maybe on a busy machine."""
        return max(START_S, self.timeout_s)

    def to_env(self) -> dict[str, str]:
        """Return the environment variables from which a child process reads this configuration."""
        return {ENV_CONFIG: msgspec.json.encode(self, enc_hook=_encode_path).decode()}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Config":
        """Read a configuration which `to_env` wrote; defaults where there is none.

        Raises UsageError where the variable is there and malformed.
        """
        text = (os.environ if environ is None else environ).get(ENV_CONFIG)
        if text is None:
            return cls()
        try:
            return msgspec.json.decode(text, type=cls, dec_hook=_decode_path)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise UsageError(
                f"expected {ENV_CONFIG} as mpsrun writes it, found {text[:80]!r} ({error}); unset it"
            ) from None

    def _in_run_dir(self, name: str) -> Path:
        if self.run_dir is None:
            raise MpsrunError(f"expected a run directory for {name!r}, found none; start with mpsrun")
        return self.run_dir / name


def socket_address(path: Path) -> str:
    """Return the `ipc://` address of a socket file; UsageError where its path is too long for the kernel."""
    size_bytes = len(os.fsencode(path))
    if size_bytes > SOCKET_PATH_LIMIT_BYTES:
        raise UsageError(
            f"expected socket paths of at most {SOCKET_PATH_LIMIT_BYTES} bytes, found {size_bytes} ({path}); "
            "set XDG_RUNTIME_DIR or TMPDIR to a directory with a shorter name"
        )
    return f"ipc://{path}"


def available_cores() -> int:
    """Return the CPU cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def current() -> Config:
    """Return the configuration of this process, read once from its environment; else defaults."""
    return Config.from_env()


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"cannot write {type(value).__name__} into {ENV_CONFIG}")


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"cannot read {kind.__name__} from {ENV_CONFIG}")
