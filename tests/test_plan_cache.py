"""Plans kept on disk: what comes back, what is ignored, and that nothing ends the run."""

import errno
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from mpsrun.config import Config
from mpsrun.run import plan_cache
from mpsrun.run.plan_cache import Entry, Key, PlanCache

KEY = Key(
    graph="3f2a9c01",
    shapes="f32[4,128,64]",
    device="NVIDIA H100",
    driver="580.159",
    torch="2.13.0",
    mpsrun="0.1.0",
    workers=3,
    mps="on",
)
ENTRY = Entry(
    candidate="workers, 4 lanes",
    plan="region 0: lead | worker 1\nregion 3: declined, too small\n",
    medians_us={"serial": 40_500.0, "workers, 4 lanes": 14_600.5},
    branch_us={0: (9_000.0, 9_100.5)},
)


@dataclass(frozen=True)
class Setup:
    cache: PlanCache
    directory: Path
    said: list[str]

    @property
    def file(self) -> Path:
        return self.directory / f"{KEY.digest()}.json"


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    said: list[str] = []
    monkeypatch.setattr(plan_cache, "_warned", False)
    monkeypatch.setattr(plan_cache.log, "say", said.append)
    return Setup(PlanCache(tmp_path / "some" / "plans"), tmp_path / "some" / "plans", said)


def test_what_is_stored_comes_back(setup: Setup) -> None:
    assert setup.cache.load(KEY) is None
    setup.cache.store(KEY, ENTRY)
    assert PlanCache(setup.directory).load(KEY) == ENTRY
    newer = msgspec.structs.replace(ENTRY, plan="region 0: stream 1 | lead\n")
    setup.cache.store(KEY, newer)
    assert setup.cache.load(KEY) == newer
    assert [path.name for path in setup.directory.iterdir()] == [setup.file.name]
    assert setup.said == []


def test_only_its_user_may_look_inside(setup: Setup) -> None:
    setup.cache.store(KEY, ENTRY)
    assert setup.directory.stat().st_mode & 0o777 == 0o700
    assert setup.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Key)])
def test_every_part_of_the_key_counts(setup: Setup, field: str) -> None:
    setup.cache.store(KEY, ENTRY)
    other = msgspec.structs.replace(KEY, **{field: 4 if field == "workers" else "other"})
    assert setup.cache.load(other) is None
    assert setup.said == []


GOOD = msgspec.json.encode(plan_cache._File(plan_cache.FORMAT, KEY, ENTRY))
OTHER = msgspec.structs.replace(KEY, mpsrun="0.0.1")


BROKEN = {
    "empty": b"",
    "truncated": GOOD[:-1],
    "half": GOOD[: len(GOOD) // 2],
    "binary": b"\xff\x00\xfe" * 100,
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "text for a number": GOOD.replace(b'"workers":3', b'"workers":"3"'),
    "text for a time": GOOD.replace(b"14600.5", b'"14600.5"'),
    "text for a region": GOOD.replace(b'"branch_us":{"0"', b'"branch_us":{"x"'),
    "not a plan": GOOD.replace(b"region 0: lead", b"region 0: led"),
    "no UTF-8": GOOD.replace(b"4 lanes", b"4 \xff\xfe"),
    "huge": GOOD.replace(b"4 lanes", b"4" * plan_cache.MAX_ENTRY_BYTES),
    "a later format": GOOD.replace(b'"format":1', b'"format":2'),
    "more than there should be": GOOD.replace(b'"format":1', b'"format":1,"more":1'),
    "another key": msgspec.json.encode(plan_cache._File(plan_cache.FORMAT, OTHER, ENTRY)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_entry_is_ignored_with_one_warning(setup: Setup, data: bytes) -> None:
    assert data != GOOD
    setup.directory.mkdir(parents=True)
    setup.file.write_bytes(data)
    for _ in range(3):
        assert setup.cache.load(KEY) is None
    assert len(setup.said) == 1
    assert str(setup.file) in setup.said[0]
    assert setup.said[0].endswith("mpsrun tunes anew")
    assert "\n" not in setup.said[0]
    setup.cache.store(KEY, ENTRY)
    assert setup.cache.load(KEY) == ENTRY


def test_a_file_where_the_directory_should_be(setup: Setup) -> None:
    setup.directory.parent.mkdir()
    setup.directory.write_text("in the way")
    setup.cache.store(KEY, ENTRY)
    assert setup.cache.load(KEY) is None
    assert len(setup.said) == 1
    assert "could not keep a plan" in setup.said[0]
    assert setup.directory.read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(setup: Setup) -> None:
    setup.cache.store(KEY, ENTRY)
    setup.directory.chmod(0o500)
    setup.cache.store(KEY, msgspec.structs.replace(ENTRY, candidate="streams"))
    assert setup.cache.load(KEY) == ENTRY
    assert len(setup.said) == 1
    setup.directory.chmod(0o700)


@pytest.mark.parametrize("step", ["fdopen", "replace"])
def test_a_full_disk_loses_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    setup.cache.store(KEY, ENTRY)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace") if step == "replace" else (plan_cache.os, "fdopen")), full)
        for _ in range(3):
            setup.cache.store(KEY, msgspec.structs.replace(ENTRY, candidate="streams"))
    assert setup.cache.load(KEY) == ENTRY
    assert len(setup.said) == 1
    assert "No space left on device" in setup.said[0]
    assert len(list(setup.directory.iterdir())) == 1, "no half file stays"


def test_the_oldest_entries_go_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MAX_ENTRIES", 3)
    keys = [msgspec.structs.replace(KEY, workers=count) for count in range(5)]
    for age, key in enumerate(keys):
        setup.cache.store(key, ENTRY)
        when = time.time() - 100 + age
        os.utime(setup.directory / f"{key.digest()}.json", (when, when))
    assert [setup.cache.load(key) is not None for key in keys] == [False, False, True, True, True]


def test_what_a_killed_process_left_is_removed_once_it_is_old(setup: Setup) -> None:
    setup.directory.mkdir(parents=True)
    old, young = setup.directory / "old.tmp", setup.directory / "young.tmp"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (1.0, 1.0))
    setup.cache.store(KEY, ENTRY)
    assert (old.exists(), young.exists()) == (False, True)


WRITER = """
import sys
from pathlib import Path
import msgspec
from mpsrun.run.plan_cache import Entry, Key, PlanCache

cache = PlanCache(Path(sys.argv[1]))
key = msgspec.json.decode(sys.argv[2], type=Key)
for _ in range(300):
    cache.store(key, Entry(candidate=sys.argv[3], plan="region 0: lead\\n" + f"# {sys.argv[3]}\\n" * 2000))
    found = cache.load(key)
    assert found is not None and found.plan.count(found.candidate) == 2000, found
"""


def test_two_processes_that_write_at_once(setup: Setup) -> None:
    arguments = [sys.executable, "-c", WRITER, str(setup.directory), msgspec.json.encode(KEY).decode()]
    both = [subprocess.Popen([*arguments, name], stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert setup.cache.load(KEY) is not None
    assert len(list(setup.directory.iterdir())) == 1


def test_the_directory_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Config().plan_cache_dir == tmp_path / "mpsrun" / "plans"
