"""A GPU that is made up."""

import sys

import pytest

from tests.monitor.fake_pynvml import FakeNvml


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return put_fake_nvml(monkeypatch)


def put_fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Let `import pynvml` find a fake, for as long as `monkeypatch` holds."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    return fake
