"""Where mpsrun itself is found by the processes that it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def with_package(environ: Mapping[str, str]) -> dict[str, str]:
    """Let a child find mpsrun where only our working directory or PYTHONPATH had it, as in a checkout."""
    root = Path(__file__).parents[1]
    if root.name in ("site-packages", "dist-packages"):
        return dict(environ)
    paths = [str(root), *filter(None, [environ.get("PYTHONPATH")])]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}
