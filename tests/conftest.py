"""Options, and which tests run where."""

import pytest

from mpsrun.launch.hardware import detect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take longer than a minute")
    parser.addoption("--gpu", action="store_true", help="run only the tests that need an NVIDIA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    hardware = detect()
    for item in items:
        if "gpu" in item.keywords and hardware.kind != "nvidia":
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {hardware.reason}"))
        if "gpu" not in item.keywords and config.getoption("--gpu"):
            item.add_marker(pytest.mark.skip(reason="needs no GPU, and --gpu is given"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
