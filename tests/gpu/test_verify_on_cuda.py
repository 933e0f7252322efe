"""`--verify N` on the GPU, where backward passes run in a thread of autograd's own and branches draw random numbers."""

import pool
import pytest
import torch
from networks import SMALL, Three
from torch import Tensor
from transparency import assert_transparent, on_lanes

from mpsrun.run import forkjoin
from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.gpu
STEPS = 2
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _verifying(on_gpu: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.verify_steps(on_gpu, STEPS, monkeypatch)


@pytest.mark.parametrize("name", ["batch norm", "dropout", "heads", "inception", "transformers"])
def test_right_networks_pass(capfd: Capture, name: str) -> None:
    case = SMALL[name]
    used = None if name == "dropout" else case.used
    assert_transparent(case.model, case.inputs, 2, case.regions, used=used, device="cuda")
    assert f"mpsrun: verified {STEPS} steps of a network: " in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(capfd: Capture, dtype: torch.dtype) -> None:
    model = on_lanes(Three().cuda(), 2)
    for _ in range(STEPS + 1):
        with torch.autocast("cuda", dtype):
            loss = model(torch.randn(8, 6, device="cuda")).float().square().sum()
        (loss * 1024).backward()
    assert f"mpsrun: verified {STEPS} steps of a network: " in capfd.readouterr().err


def test_a_fault_ends_the_script_out_of_a_backward_pass(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_lanes(Three().cuda().double(), 2)
    given = torch.randn(5, 6, dtype=torch.float64, device="cuda")
    model(given).sum().backward()
    collect = forkjoin._collect

    def doubled(*args: object) -> list[Tensor | None]:
        return [gradient if gradient is None else 2 * gradient for gradient in collect(*args)]  # type: ignore[arg-type]

    monkeypatch.setattr(forkjoin, "_collect", doubled)
    loss = model(given).sum()
    with pytest.raises(SystemExit) as end:
        loss.backward()
    assert end.value.code == 4
    assert "paths.2.0.weight" in capfd.readouterr().err
