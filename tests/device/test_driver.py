"""Streams that nobody else gets, on a driver that is made up."""

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

from mpsrun.device import driver
from mpsrun.device.driver import own_stream


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda raw, device: (raw, device.index))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("torch's", device.index))
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1))


@pytest.mark.parametrize("status", [0, 2])
def test_a_stream_that_nobody_else_has(
    status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def create(address: int, flags: int) -> int:
        asked.append(flags)
        ctypes.c_void_p.from_address(address).value = 0x1000
        return status

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        asked.append(f"device {device.index}")
        yield

    monkeypatch.setattr(driver, "driver_function", lambda name, kinds: {("cuStreamCreate", "pI"): create}[name, kinds])
    monkeypatch.setattr(torch, "zeros", lambda _size, device: asked.append(f"context {device.index}"))
    monkeypatch.setattr(torch.cuda, "device", on)
    assert own_stream(torch.device("cuda", 3)) == (("torch's", 3) if status else (0x1000, 3))
    assert ("cuStreamCreate failed (error 2" in capfd.readouterr().err) == bool(status)
    assert asked == ["device 3", "context 3", 1], "one that the default stream does not hold, in that device's context"


def test_a_driver_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def missing(*_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "driver_function", missing)
    assert own_stream(torch.device("cuda", 0)) == ("torch's", 0)
    assert "libcuda.so.1" in capfd.readouterr().err
