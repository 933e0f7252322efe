"""Python's flags, hooks on imports, hardware, configuration."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpsrun.config import Config, socket_address
from mpsrun.errors import MpsrunError, UsageError
from mpsrun.launch import hardware, spawn, supervisor
from mpsrun.launch.keeper import Keeper
from mpsrun.launch.on_import import after_import
from mpsrun.launch.python_flags import python_flags

FLAGS = [
    ("python script.py -u", []),
    ("python -u -m mpsrun -u", ["-u"]),
    ("python -uBm mpsrun", ["-uB"]),
    ("python -W error -X dev script.py", ["-W", "error", "-X", "dev"]),
    ("python -Werror -Xdev -m mpsrun", ["-Werror", "-Xdev"]),
    ("python -uW error script.py", ["-uW", "error"]),
    ("python --check-hash-based-pycs always -I script.py", ["--check-hash-based-pycs", "always", "-I"]),
    ("python -mmpsrun x", []),
    ("python", []),
]


@pytest.mark.parametrize(("line", "flags"), FLAGS, ids=[line for line, _ in FLAGS])
def test_python_flags(line: str, flags: list[str]) -> None:
    assert python_flags(line.split()) == flags


def test_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module.py").write_text("import sys\nx = 1\nloader = __spec__.loader\nassert __loader__ is loader")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    seen: list[int] = []
    after_import("late_module", lambda: seen.append(sys.modules["late_module"].x))
    import json  # noqa: F401 - any other import

    assert seen == []
    import late_module  # type: ignore[import-not-found]

    assert seen == [1]
    assert sys.meta_path == before
    assert late_module.__spec__.loader is late_module.loader
    assert "exec_module" not in vars(late_module.loader)
    after_import("late_module", lambda: seen.append(2))
    assert seen == [1, 2]
    del sys.modules["late_module"]


def test_after_an_import_that_fails_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shaky_module.py"
    path.write_text("raise ImportError('not yet')")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[str] = []
    after_import("shaky_module", lambda: seen.append("called"))
    with pytest.raises(ImportError, match="not yet"):
        import shaky_module  # type: ignore[import-not-found]
    assert seen == []
    path.write_text("x = 'works now'")
    sys.path_importer_cache.clear()
    import shaky_module  # noqa: F401

    assert seen == ["called"]
    del sys.modules["shaky_module"]


@pytest.mark.parametrize(
    ("build", "files", "environ", "kind"),
    [
        ({"cuda": "13.0"}, ["dev/nvidiactl"], {}, "nvidia"),
        ({"cuda": "13.0"}, ["dev/nvidiactl"], {"CUDA_VISIBLE_DEVICES": "1"}, "nvidia"),
        ({"cuda": "13.0"}, ["dev/nvidiactl"], {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"cuda": "13.0"}, ["dev/nvidiactl"], {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"cuda": "13.0"}, [], {}, "cpu"),
        ({"cuda": None}, ["dev/nvidiactl"], {}, "cpu"),
        ({}, ["dev/nvidiactl"], {}, "cpu"),
        ({"hip": "7.1"}, ["dev/kfd"], {}, "rocm"),
        ({"hip": "7.1"}, [], {}, "cpu"),
    ],
)
def test_hardware(
    build: dict[str, str | None],
    files: list[str],
    environ: dict[str, str],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "torch_build", lambda: build)
    (tmp_path / "dev").mkdir()
    for name in files:
        (tmp_path / name).touch()
    found = hardware.detect(environ, "linux", tmp_path)
    assert found.kind == kind
    assert bool(found.reason) == (kind != "nvidia")


def test_a_mac() -> None:
    assert hardware.detect({}, "darwin").kind == "apple"


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    assert set(hardware.torch_build()) <= {"cuda", "hip"}


def test_only_workers_are_started_with_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(spawn, "_spawn_own", lambda _role, _log, environ, _parent: started.append(dict(environ)))
    for share in (None, 40):
        spawn.spawn_worker(Config(run_dir=tmp_path, worker_share=share), 1, 1)
    spawn.spawn_guard(tmp_path, tmp_path, 1)
    assert [environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for environ in started] == [None, "40", None]


def test_config_reads_back() -> None:
    config = Config(workers=2, lanes="workers", log_dir=Path("/l"), timeout_s=2.5, run_dir=Path("/r"), strict=True)
    assert Config.from_env(config.to_env()) == config
    assert Config.from_env({}) == Config()


@pytest.mark.parametrize("text", ["", "{", '{"workers": "x"}', "[]", '{"lanes": "none"}'])
def test_a_malformed_config_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MPSRUN_CONFIG"):
        Config.from_env({"MPSRUN_CONFIG": text})


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, count in ((1, 1), (2, 1), (3, 2), (64, 4)):
        monkeypatch.setattr("mpsrun.config.available_cores", lambda cores=cores: cores)
        assert Config().worker_count() == count
    assert Config(workers=5).worker_count() == 5
    assert Config(lanes="serial", workers=5).worker_count() == 0


def test_paths_need_a_run_directory_of_a_length() -> None:
    with pytest.raises(MpsrunError, match="expected a run directory"):
        _ = Config().report_socket
    with pytest.raises(UsageError, match="at most 100 bytes, found 101"):
        socket_address(Path("/" + "x" * 100))
    assert socket_address(Path("/" + "x" * 99)) == "ipc:///" + "x" * 99


def test_a_log_in_the_run_directory_goes_with_it(tmp_path: Path) -> None:
    run_dir, log_dir = tmp_path / "run", tmp_path / "logs"
    config = Config(run_dir=run_dir)
    assert config.kept_log(config.worker_log(1)) is None
    kept = Config(run_dir=run_dir, log_dir=log_dir)
    assert kept.kept_log(kept.worker_log(1)) == log_dir / "worker-1.log"
    assert config.kept_log(None) is None


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (Config(), []),
        (Config(lanes="workers"), []),
        (Config(lanes="captured"), ["no GPU: with --lanes captured branches run in turn, as in plain PyTorch"]),
        (Config(lanes="captured-workers"), ["no GPU: nothing is captured, branches run in worker processes"]),
        (
            Config(explain="text"),
            ["no GPU: no plan pays on a CPU; --lanes workers tries lanes there"],
        ),
        (Config(verbose=True), ["no GPU: no plan pays on a CPU; --lanes workers tries lanes there"]),
        (
            Config(adapt="on", tune_convolutions=True, channels_last="on"),
            [
                f"{option} has no effect: no GPU"
                for option in ("--adapt on", "--tune-convolutions", "--channels-last on")
            ],
        ),
    ],
)
def test_what_needs_a_gpu_is_named(asked: Config, lines: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    supervisor._tell_without_effect(asked, "no GPU")
    assert capfd.readouterr().err == "".join(f"mpsrun: {line}\n" for line in lines)


def test_a_keeper_that_cannot_live_is_not_started_all_the_time(tmp_path: Path) -> None:
    """There are other ties than this one: the run goes on without it."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        if len(started) == 2:
            raise OSError("no more processes")
        started.append(subprocess.Popen(["true"], stdin=subprocess.PIPE, bufsize=0))
        started[-1].wait()
        return started[-1]

    keeper = Keeper(tmp_path, start)
    for _ in range(5):
        keeper.look()
    assert len(started) == 2
    keeper._next_s = 0.0
    keeper.look()
    keeper.no_lead()
    keeper.dismiss()
