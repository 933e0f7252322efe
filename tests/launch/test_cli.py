"""The command line: what is read, and one clear line with status 2 for what is wrong."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpsrun import __version__
from mpsrun.cli import HELP, main, parse
from mpsrun.config import Config
from mpsrun.errors import UsageError
from mpsrun.launch.target import Target
from tests.launch.conftest import Runner


def test_options_before_the_script_are_ours() -> None:
    words = (
        "--workers 2 --lanes=workers --log-dir /l --timeout 1.5 --strict --verbose --verify 3 t.py --workers x -m --"
    )
    config, target = parse(words.split())
    wanted = Config(workers=2, lanes="workers", log_dir=Path("/l"), timeout_s=1.5, strict=True, verbose=True, verify=3)
    wanted = replace(wanted, channels_last="off")  # what other kernels round cannot be told from a fault
    assert config == wanted
    assert target == Target("script", "t.py", ("--workers", "x", "-m", "--"))


def test_shares_and_convolutions() -> None:
    config, _ = parse(["--worker-share", "40", "--tune-convolutions", "t.py"])
    assert config == Config(worker_share=40, tune_convolutions=True)
    config, _ = parse(["--channels-last", "off", "t.py"])
    assert config == Config(channels_last="off")
    config, _ = parse(["--lanes", "workers", "--compile-branches", "t.py"])
    assert config == Config(lanes="workers", compile_branches=True)


@pytest.mark.parametrize("name", ["--log-dir", "--log_dir"])
def test_dashes_and_underscores(name: str) -> None:
    assert parse([name, "/l", "t.py"])[0].log_dir == Path("/l")


def test_modules_and_the_end_of_options() -> None:
    assert parse(["--mps", "off", "-m", "a.b", "-m"])[1] == Target("module", "a.b", ("-m",))
    assert parse(["--", "t.py"])[1] == Target("script", "t.py")
    assert parse(["--workers", "auto", "t.py"])[0].workers is None


@pytest.mark.parametrize("target", [Target("script", "t.py", ("-m", "x")), Target("module", "a.b", ("t.py",))])
def test_a_target_reads_back(target: Target) -> None:
    assert Target.from_argv(target.to_argv()) == target


WRONG = [
    ([], "expected a script"),
    (["-m"], "nothing after -m"),
    (["-"], "standard input"),
    (["--nosuch", "t.py"], "'--nosuch'; see mpsrun --help"),
    (["--lane", "workers", "t.py"], "'--lane'; did you mean --lanes?"),
    (["--log_dirs", "x", "t.py"], "'--log_dirs'; did you mean --log-dir?"),
    (["--max-restarts", "9" * 5000, "t.py"], "a whole number from 0, found"),
    (["-x", "t.py"], "'-x'"),
    (["--workers"], "expected a value after --workers"),
    (["--workers", "0", "t.py"], "from 1 to 64, found '0'; to run without workers use --lanes serial"),
    (["--workers", "x", "t.py"], "found 'x'"),
    (["--workers", "-1", "t.py"], "found '-1'"),
    (["--workers", "65", "t.py"], "found '65'; auto takes at most 4"),
    (["--lanes", "all", "t.py"], "auto|serial|streams|captured|workers"),
    (["--mps=maybe", "t.py"], "auto|on|off"),
    (["--capture", "on", "t.py"], "auto|off"),
    (["--worker-share", "0", "t.py"], "from 1 to 100, found '0'"),
    (["--worker-share", "101", "t.py"], "from 1 to 100, found '101'"),
    (["--worker-share", "50", "--mps", "off", "t.py"], "CUDA MPS for --worker-share, found --mps off"),
    (["--worker-share", "50", "--lanes", "streams", "t.py"], "for --worker-share, found --lanes streams"),
    (["--tune-convolutions", "--lanes", "workers", "t.py"], "--lanes auto for --tune-convolutions"),
    (["--channels-last", "on", "--lanes", "streams", "t.py"], "--lanes auto or captured for --channels-last on"),
    (["--channels-last", "on", "--tune-convolutions", "t.py"], "--tune-convolutions or --channels-last on, found both"),
    (["--channels-last", "on", "--verify", "3", "t.py"], "expected --verify or --channels-last on, found both"),
    (["--channels-last", "yes", "t.py"], "auto|on|off"),
    (["--adapt", "on", "--lanes", "serial", "t.py"], "--lanes auto for --adapt on"),
    (["--tune-convolutions=1", "t.py"], "--tune-convolutions alone"),
    (["--compile-branches", "--lanes", "streams", "t.py"], "for --compile-branches, found --lanes streams"),
    (["--timeout", "0", "t.py"], "above 0"),
    (["--timeout", "nan", "t.py"], "above 0"),
    (["--strict=yes", "t.py"], "--strict alone"),
    (["--log-dir", "", "t.py"], "an empty name"),
    (["--verify", "0", "t.py"], "a whole number from 1, found '0'"),
    (["--verify", "-1", "t.py"], "found '-1'"),
    (["--verify=1.5", "t.py"], "found '1.5'"),
    (["--verify", "t.py"], "found 't.py'"),
    (["--verify", "2", "--lanes", "serial", "t.py"], "found --lanes serial"),
    (["explain"], "expected a script"),
    (["explain", "-m"], "nothing after -m"),
    (["explain", "--lanes", "serial", "t.py"], "expected lanes to explain, found --lanes serial"),
    (["explain", "--steps", "0", "t.py"], "a whole number from 1, found '0'; 120"),
    (["explain", "--steps"], "expected a value after --steps"),
    (["explain", "--json=yes", "t.py"], "--json alone"),
    (["explain", "--nosuch", "t.py"], "'--nosuch'"),
    (["--json", "t.py"], "--json after explain only"),
    (["--verbose", "explain", "t.py"], "found explain behind options; it comes first: mpsrun explain [options]"),
    (["--verbose", "doctor"], "found doctor behind options"),
    (["--steps", "3", "t.py"], "--steps after explain only"),
]


@pytest.mark.parametrize(("words", "text"), WRONG, ids=[" ".join(words) or "nothing" for words, _ in WRONG])
def test_wrong_use(words: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=r"expected .*found") as error:
        parse(words)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_explain_comes_first_and_has_options_of_its_own() -> None:
    config, target = parse(["explain", "--json", "--steps=7", "--workers", "2", "t.py", "--json"])
    assert config == Config(explain="json", steps=7, workers=2)
    assert target == Target("script", "t.py", ("--json",))
    assert parse(["explain", "-m", "a.b"]) == (Config(explain="text"), Target("module", "a.b"))
    for words in (["--", "explain"], ["./explain"]):
        assert parse(words)[0].explain == ""
        assert parse(words)[1].name == words[-1]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["--help"]) == 0
    assert main(["explain", "--help"]) == 0
    assert capsys.readouterr().out == f"mpsrun {__version__}\n{HELP}{HELP}"


def test_the_launcher_imports_neither_torch_nor_zmq(runner: Runner) -> None:
    check = "import sys, mpsrun.cli, mpsrun.launch.supervisor\nprint([m for m in ('torch', 'zmq') if m in sys.modules])"
    assert runner.python("-c", check).stdout == b"[]\n"


def test_version_is_quick(runner: Runner) -> None:
    start = time.monotonic()
    assert runner.mpsrun("--version").returncode == 0
    assert time.monotonic() - start < 2


BAD_INPUT = {
    "no-such-script": (["nosuch.py"], {}, "no file 'nosuch.py'"),
    "directory": (["empty"], {}, "the directory 'empty'"),
    "explain-no-such-script": (["explain", "nosuch.py"], {}, "no file 'nosuch.py'"),
    "no-such-module": (["-m", "nosuch.mod"], {}, "no module named 'nosuch.mod'"),
    "unknown-flag": (["--nosuch", "t.py"], {}, "--nosuch"),
    "workers-0": (["--workers", "0", "t.py"], {}, "'0'"),
    "no-gpu": (["--mps", "on", "t.py"], {"CUDA_VISIBLE_DEVICES": ""}, "--mps on"),
    "runtime-dir-not-writable": (["t.py"], {"XDG_RUNTIME_DIR": "/proc"}, "can be written, found /proc"),
    "log-dir-not-writable": (["--log-dir", "/proc/x", "t.py"], {}, "--log-dir"),
}


@pytest.mark.parametrize(("args", "env", "text"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(runner: Runner, args: list[str], env: dict[str, str], text: str) -> None:
    runner.script("print('never')", "t.py")
    (runner.cwd / "empty").mkdir()
    runner.env = env
    done = runner.mpsrun(*args)
    assert (done.returncode, done.stdout) == (2, b"")
    line = done.stderr.decode()
    assert line.startswith("mpsrun: expected ")
    assert line.count("\n") == 1
    assert "found" in line
    assert text in line


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_a_run_directory_too_long_for_a_socket(runner: Runner, tmp_path: Path, variable: str) -> None:
    runner.script("print('never')")
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    runner.env = {"XDG_RUNTIME_DIR": "", variable: str(deep)}
    done = runner.mpsrun("train.py")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"expected socket paths of at most 100 bytes" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert not any(entry.is_dir() for entry in deep.glob("*/*"))
