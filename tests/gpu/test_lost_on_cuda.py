"""A worker on the GPU that raises, dies or hangs: the stand-in finishes the step with the right numbers."""

import copy
import os
import signal
import threading
from collections.abc import Callable

import msgspec
import pytest
import torch
from networks import Three
from transparency import assert_same, on_lanes

from mpsrun.run.coordinator import Coordinator
from mpsrun.wire import messages as m

pytestmark = pytest.mark.gpu
EXACT = {"rtol": 1e-9, "atol": 1e-11}
Fault = Callable[[Coordinator, int, pytest.MonkeyPatch], None]


def killed(coordinator: Coordinator, pid: int, _: pytest.MonkeyPatch) -> None:
    """Die with a message unread: nothing of the victim runs on the GPU."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()


def stuck(coordinator: Coordinator, pid: int, _: pytest.MonkeyPatch) -> None:
    """Do nothing from now on; the watchdog has to notice."""
    os.kill(pid, signal.SIGSTOP)


def raising(coordinator: Coordinator, pid: int, patch: pytest.MonkeyPatch) -> None:
    """Be told to do the next piece of work with a layout that does not exist."""
    send_step = coordinator._channel.send_step
    victim = next(link.index for link in coordinator.links if link.pid == pid)

    def send_wrong(worker: int, message: m.Forward | m.Backward) -> None:
        send_step(worker, msgspec.structs.replace(message, layout=10**9) if worker == victim else message)

    patch.setattr(coordinator._channel, "send_step", send_wrong)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fault", [raising, killed, stuck])
def test_the_run_goes_on(expendable: Coordinator, fault: Fault, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = Three().to("cuda", torch.float64)
    fast = on_lanes(copy.deepcopy(plain), 1)
    victim = expendable.usable()[0]
    pid = expendable.links[victim - 1].pid
    assert pid is not None
    for step in range(5):
        x = torch.randn(5, 6, device="cuda", dtype=torch.float64)
        seen = []
        for model in (plain, fast):
            hurt = model is fast and step == 2
            if hurt and where == "forward":
                fault(expendable, pid, monkeypatch)
            model.zero_grad()
            output = model(x)
            if hurt and where == "backward":
                torch.cuda.synchronize()
                fault(expendable, pid, monkeypatch)
            output.square().sum().backward()
            torch.cuda.synchronize()
            monkeypatch.undo()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            seen.append({"output": output.detach(), **gradients, **model.state_dict()})
        assert_same(seen[1], seen[0], f"step {step}", EXACT)
    assert victim not in expendable.usable()
    assert expendable.usable(), "only the victim is out"
