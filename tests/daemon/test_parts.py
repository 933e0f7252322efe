"""Settings, logs, and what systemd is told."""

import os
import socket
from pathlib import Path

import pytest

from mpsrun.daemon.logs import rotate
from mpsrun.daemon.notify import notify
from mpsrun.daemon.settings import Settings
from mpsrun.errors import UsageError
from mpsrun.mps.places import Places

A, B = "GPU-11111111-2222-3333-4444-555555555555", "GPU-99999999-2222-3333-4444-555555555555"


def read(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "daemon.toml").write_text(text)
    return Settings.read(tmp_path / "daemon.toml", must_exist=True)


def test_all_settings(tmp_path: Path) -> None:
    text = (
        f'gpus = ["{A}", "{B}"]\nactive_thread_percentage = 40\nlog_max_mib = 1\nlog_keep = 0\n'
        f'[pinned_memory_limit]\n"{B}" = "8G"\n'
    )
    settings = read(tmp_path, text)
    assert settings == Settings((A, B), 40, {B: "8G"}, 1, 0)
    assert settings.memory_limits() == {1: "8G"}


def test_no_file_is_the_defaults_unless_it_was_named(tmp_path: Path) -> None:
    assert Settings.read(tmp_path / "none.toml", must_exist=False) == Settings()
    with pytest.raises(UsageError, match=r"found no such file; write it"):
        Settings.read(tmp_path / "none.toml", must_exist=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sahre = 3", "unknown field `sahre`"),
        ("active_thread_percentage = 0", r">= 1.*active_thread_percentage"),
        ("active_thread_percentage = 101", r"<= 100.*active_thread_percentage"),
        ("active_thread_percentage = 33.3", r"Expected `int`.*active_thread_percentage"),
        ('gpus = ["0"]', r"matching regex.*gpus"),
        (f'pinned_memory_limit = {{"{A}" = "8G"}}', f"lists in gpus, found {A}; add it"),
        (f'gpus = ["{A}"]\npinned_memory_limit = {{"{A}" = "lots"}}', "matching regex"),
        ("log_keep = -1", ">= 0"),
        ("= 3", "TOML"),
    ],
)
def test_wrong_settings_are_one_clear_line(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "daemon.toml") in str(error.value)


def test_logs_are_rotated_while_somebody_writes_them(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    for number in range(4):
        with log.open("ab") as file:
            file.write(b"%d" % number * 9000)
            file.flush()
            rotate([log, tmp_path / "none.log"], 8192, keep=2)
            file.write(b"later")
            file.flush()
            assert log.read_bytes() == b"later"
    assert (tmp_path / "server.log.1").read_bytes() == b"later" + b"3" * 9000
    assert (tmp_path / "server.log.2").read_bytes() == b"later" + b"2" * 9000
    assert len(list(tmp_path.iterdir())) == 3


def test_a_writer_that_does_not_append_leaves_a_hole_that_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "control.log"
    with log.open("wb", buffering=0) as file:
        file.write(b"x" * 100_000)
        rotate([log], 50_000, keep=1)
        file.write(b"y")
        before = (tmp_path / "control.log.1").read_bytes()
        rotate([log], 50_000, keep=1)
    assert before == b"x" * 100_000 == (tmp_path / "control.log.1").read_bytes()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"mpsrun-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}" if abstract else name)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        notify("READY=1", "STATUS=ready")
        assert receiver.recv(1000) == b"READY=1\nSTATUS=ready"
    notify("WATCHDOG=1")  # nobody there any more
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("WATCHDOG=1")


def test_a_long_path_and_a_foreign_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(UsageError, match="socket paths of at most 100 bytes"):
        Places.user().make()
    elsewhere = Path(tmp_path.anchor) / "tmp"
    places = Places(tmp_path / "l", tmp_path / "logs", tmp_path / "none")
    places.runtime_dir.symlink_to(elsewhere)
    if len(str(places.pipe_dir)) < 80:
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
        with pytest.raises(UsageError, match="or a link; remove it"):
            places.make()
