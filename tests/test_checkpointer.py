"""Checkpoints: what is interrupted anywhere ends as if it had not been, and a harmed file is not believed."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mpsrun
from mpsrun.errors import UsageError


class Noisy(Dataset[Tensor]):
    """Each item draws from every generator that a transform may use."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()])


class Interrupted(Exception):
    """The end of a process."""


def loader(workers: int = 0, own: bool = False) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(5) if own else None
    return DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=workers, generator=generator)


def train(path: Path, epochs: int, until: int, batches: DataLoader[Tensor], **options: Any) -> Iterator[Tensor]:
    """Yield what each step saw and computed; a start of the process, as often as it is called."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    checkpointer = mpsrun.Checkpointer(path, model, optimizer, **options)
    for _ in checkpointer.epochs(epochs):
        for batch in checkpointer.batches(batches):
            if checkpointer.step == until:
                raise Interrupted
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            yield torch.cat([batch.flatten(), loss.detach().flatten()])


def collect(path: Path, until: int, **options: Any) -> list[Tensor]:
    """All steps of a run that is interrupted before step `until`."""
    given = loader(options.pop("workers", 0), options.pop("own", False))
    seen: list[Tensor] = []
    try:
        for step in train(path, 3, until, given, **options):
            seen.append(step)  # noqa: PERF402 - those before the end count
    except Interrupted:
        pass
    return seen


def test_the_last_step_is_kept_whatever_the_rhythm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(collect(tmp_path, -1, every=8)) == 21
    assert max(path.name for path in tmp_path.iterdir()).startswith("step-0000000021-")
    assert collect(tmp_path, -1, every=8) == []
    assert "all of this training was done before, in 21 steps" in capfd.readouterr().err
    model = nn.Linear(1, 1)
    assert [*mpsrun.Checkpointer(tmp_path / "steps", model, every=100).steps(5)] == [0, 1, 2, 3, 4]
    assert [*mpsrun.Checkpointer(tmp_path / "steps", model, every=100).steps(7)] == [5, 6]


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UsageError, match=r"expected a directory for checkpoints at .*checkpoints, found"):
        mpsrun.Checkpointer(tmp_path / "checkpoints", nn.Linear(1, 1))


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"own": True}], ids=str)
@pytest.mark.parametrize("stops", [(1,), (7,), (3, 9, 10), (14, 20)], ids=str)
def test_an_interrupted_run_equals_one_that_was_not(tmp_path: Path, options: Any, stops: tuple[int, ...]) -> None:
    """Within an epoch, at its end, several times: the same batches, the same random numbers, the same losses."""
    if "workers" in options:
        stops = stops[:2] if stops == (3, 9, 10) else stops
    whole = collect(tmp_path / "whole", -1, **dict(options))
    assert len(whole) == 21
    parts: list[Tensor] = []
    for until in (*stops, -1):
        parts += collect(tmp_path / "parts", until, **dict(options))
    assert len(parts) == len(whole)
    for found, wanted in zip(parts, whole, strict=True):
        assert torch.equal(found, wanted)


def test_steps_without_epochs(tmp_path: Path) -> None:
    for stop, start in ((4, 0), (9, 4)):
        model = nn.Linear(1, 1)
        checkpointer = mpsrun.Checkpointer(tmp_path, model)
        assert checkpointer.step == start
        for step in checkpointer.steps(9):
            if step == stop:
                break
            with torch.no_grad():
                model.weight.fill_(step)
    assert checkpointer.step == 9


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    collect(tmp_path, 8, keep=2)
    assert [name[:15] for name in names(tmp_path)] == ["step-0000000007", "step-0000000008"]
    collect(tmp_path, 12, keep=2, every=3)
    assert [name[:15] for name in names(tmp_path)] == ["step-0000000009", "step-0000000012"]


@pytest.mark.parametrize("harm", ["torn", "bit", "empty", "unreadable"])
def test_a_harmed_file_is_told_and_the_one_before_taken(tmp_path: Path, harm: str, capfd: Any) -> None:
    collect(tmp_path, 5)
    newest = tmp_path / names(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    match harm:
        case "torn":
            newest.write_bytes(data[: len(data) // 2])
        case "bit":
            data[len(data) // 2] ^= 1
            newest.write_bytes(data)
        case "empty":
            newest.write_bytes(b"")
        case "unreadable":
            newest.unlink()
            newest.mkdir()
    checkpointer = mpsrun.Checkpointer(tmp_path, *parts())
    assert checkpointer.step == 4
    text = capfd.readouterr().err
    assert f"expected a whole checkpoint in {newest}, found " in text
    assert "taking the one before" in text


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1))
    return model, torch.optim.Adam(model.parameters())


def test_nothing_that_is_code_is_loaded(tmp_path: Path) -> None:
    """Somebody puts a file there whose content would run code: torch refuses it, whatever its name claims."""
    import hashlib
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os._exit, (66,)

    data = pickle.dumps(Evil())
    digest = hashlib.sha256(data).hexdigest()[:16]
    (tmp_path / f"step-0000000001-{digest}.pt").write_bytes(data)
    with pytest.raises(pickle.UnpicklingError):
        mpsrun.Checkpointer(tmp_path, *parts())


def test_what_could_not_be_loaded_is_told_when_it_is_first_saved(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> Any:
            return {"path": Path("somewhere")}

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError

    with pytest.raises(UsageError, match="weights_only=True"):
        mpsrun.Checkpointer(tmp_path, Odd()).save()
    assert names(tmp_path) == []


def test_other_parts_than_before(tmp_path: Path) -> None:
    mpsrun.Checkpointer(tmp_path, *parts()).save()
    with pytest.raises(UsageError, match="to hold 1 parts, found 2"):
        mpsrun.Checkpointer(tmp_path, parts()[0])


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The older checkpoints stay, and there is no torn one."""
    checkpointer = mpsrun.Checkpointer(tmp_path, *parts())
    checkpointer.save()
    before = names(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    checkpointer.step = 1
    checkpointer.save()
    monkeypatch.undo()
    assert "No space left on device" in capfd.readouterr().err
    assert names(tmp_path) == before


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "123.part").write_bytes(b"half")
    mpsrun.Checkpointer(tmp_path, *parts())
    assert names(tmp_path) == []
