"""Which side streams a region forks into, on streams that are made up."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpsrun.run import streams

DEVICE = torch.device("cuda", 0)


class Stream:
    """In the place of one of a GPU."""

    def wait_event(self, event: object) -> None:
        """There is nothing under way."""


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """The streams that were made."""
    made: dict[Any, Any] = {}
    monkeypatch.setattr(streams, "_streams", made)
    monkeypatch.setattr(streams, "_beside", {})
    monkeypatch.setattr(streams, "stream_on", lambda *_: Stream())
    main = SimpleNamespace(record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    return made


def sides(monkeypatch: pytest.MonkeyPatch, records: bool) -> list[Any]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: records)
    return [*streams.CudaSides(DEVICE, [(-1, ()), (-2, ())], {}, apart=False)._sides.values()]


@pytest.mark.parametrize("records", [False, True])
def test_what_sides_read_is_there_until_main_waits_for_them(records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording frees is freed behind it anyway."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: records)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _stream: None)

    class Given:
        """In the place of a tensor."""

    given = Given()
    found = weakref.ref(given)
    lanes = streams.CudaSides(DEVICE, [(-1, (given,))], {}, apart=False)
    lanes._main.wait_stream = lambda _stream: None
    del given
    assert (found() is None) == records
    lanes.join(())
    assert found() is None


def test_what_is_recorded_has_streams_of_its_own(monkeypatch: pytest.MonkeyPatch, known: dict[Any, Any]) -> None:
    """Another thread may run the same network op by op meanwhile, whose work must not get into the recording."""
    plain = sides(monkeypatch, records=False)
    made = len(known)
    recorded = sides(monkeypatch, records=True)
    assert len(known) == made == 2, "none is made while something is recorded"
    assert len({*map(id, plain)} | {*map(id, recorded)}) == 4
    assert sides(monkeypatch, records=True) == recorded
    assert streams.side_streams(DEVICE) == [*zip(plain, recorded, strict=True)]
    assert streams.side_streams(torch.device("cuda", 1)) == []
    beside = [streams.stream_beside(stream) for stream in recorded]
    assert len({*map(id, plain), *map(id, recorded), *map(id, beside)}) == 6
