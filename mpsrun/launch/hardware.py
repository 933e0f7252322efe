"""What this machine can run, found without importing torch: an NVIDIA GPU, another accelerator, or a CPU."""

import ast
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # the driver's device, and its counterpart under WSL
_ROCM_DEVICE = "/dev/kfd"


@dataclass(frozen=True)
class Hardware:
    """The kind of accelerator that the script will see, and why no NVIDIA GPU where there is none."""

    kind: Literal["nvidia", "rocm", "apple", "cpu"]
    reason: str = ""


def detect(environ: Mapping[str, str] | None = None, platform: str = sys.platform, root: Path = Path("/")) -> Hardware:
    """Return what the user's script will run on. `root` is where `/dev` lies."""
    environ = os.environ if environ is None else environ
    if platform == "darwin":
        return Hardware("apple", "this is a Mac")
    built_for = torch_build()
    if built_for.get("hip"):
        if (root / _ROCM_DEVICE.lstrip("/")).exists():
            return Hardware("rocm", "torch is built for ROCm")
        return Hardware("cpu", "torch is built for ROCm")
    if not any((root / name.lstrip("/")).exists() for name in _NVIDIA_DEVICES):
        return Hardware("cpu", "no NVIDIA driver is loaded")
    if not built_for.get("cuda"):
        return Hardware("cpu", "the installed torch is built without CUDA")
    if environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return Hardware("cpu", "CUDA_VISIBLE_DEVICES hides all GPUs")
    return Hardware("nvidia")


def torch_build() -> dict[str, str | None]:
    """Return the constants `cuda` and `hip` of torch/version.py, read as text; empty without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    except (OSError, SyntaxError):
        return {}
    found: dict[str, str | None] = {}
    for node in tree.body:
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        text = value.value if isinstance(value, ast.Constant) else None
        found |= {name.id: text for name in names if isinstance(name, ast.Name) and isinstance(text, str)}
    return {name: found.get(name) for name in ("cuda", "hip")}
