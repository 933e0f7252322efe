"""Dynamo set up as the launcher does it, for one test."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _as_launched(_fresh_torch: None) -> Iterator[None]:
    import torch._dynamo.config as dynamo

    from mpsrun.run import in_place

    with dynamo.patch({name: getattr(dynamo, name) for name in in_place.CHANGED}):
        yield
