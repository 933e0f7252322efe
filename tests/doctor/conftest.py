"""A GPU that is made up."""

import pytest

from tests.monitor.conftest import put_fake_nvml
from tests.monitor.fake_pynvml import FakeNvml


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return put_fake_nvml(monkeypatch)
