"""What the tests of faults share: a training script with a checkpoint per step, and a scripted CUDA MPS."""

import os
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import Runner, _signals_as_in_a_terminal, runner  # noqa: F401 - fixtures

FAKE_CONTROL = Path(__file__).parents[1] / "mps" / "fake_control.py"
PRETENDS_A_GPU = """
import os
from mpsrun.launch import hardware
hardware.detect = lambda *_: hardware.Hardware("nvidia")
if os.environ.get("MPSRUN_CONFIG") is None:  # the launcher: it waits less long than on a GPU
    from mpsrun.launch import group
    from mpsrun.mps import service
    group._LOOK_AGAIN_S = group._LOOK_SOON_S = service._LOOK_S = 0.1
    group.LOST_SERVER_S, service.SOUND_S = 2.0, 1.0
"""


@pytest.fixture
def cuda_mps(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Have the runner's launchers believe in an NVIDIA GPU, and find the scripted control program.

    Returns the directory of their logs, where `commands` tells what the daemons were asked.
    """
    place = tmp_path_factory.mktemp("m")
    program = place / "nvidia-cuda-mps-control"
    program.write_text(f"#!{sys.executable} -S\n{FAKE_CONTROL.read_text()}")
    program.chmod(0o755)
    (place / "sitecustomize.py").write_text(PRETENDS_A_GPU)
    paths = runner.environ()["PYTHONPATH"]
    runner.env = {
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{place}{os.pathsep}{paths}",
        "CUDA_MPS_PIPE_DIRECTORY": str(place / "nobody"),
    }
    return place
