"""Dynamo set up as the launcher does it, for one test."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _as_launched(_fresh_torch: None) -> Iterator[None]:
    import torch._dynamo.config as dynamo

    names = ("recompile_limit", "accumulated_recompile_limit", "allow_rnn", "skip_nnmodule_hook_guards")
    names += ("allow_unspec_int_on_nn_module",)
    with dynamo.patch({name: getattr(dynamo, name) for name in (*names, "suppress_errors")}):
        yield
