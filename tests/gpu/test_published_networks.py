"""Networks of torchvision and timm, trained plainly and on lanes under CUDA MPS: the same loss curve.

In double precision and with small steps. At a learning rate of 1e-3, fresh HRNets and NASNets turn one bit of noise in
their weights into a tenth of their loss within 20 steps, in plain PyTorch; at 1e-5 it stays at 1e-14.
"""

import copy
from collections.abc import Callable

import pool
import pytest
import torch
from torch import Tensor, nn
from transparency import on_lanes

from mpsrun.run import report
from mpsrun.run.coordinator import Coordinator

pytestmark = pytest.mark.gpu
STEPS = 20
TOLERANCE = 1e-9  # relative
LEARNING_RATE = 1e-5


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    models = pytest.importorskip("torchvision.models")
    return lambda: models.get_model(name, weights=None, init_weights=True, num_classes=10)


def timm_model(name: str, **options: int) -> Callable[[], nn.Module]:
    timm = pytest.importorskip("timm")
    return lambda: timm.create_model(name, num_classes=10, **options)


# How to make each, the size of its images, and how many regions it has at least.
NETWORKS = {
    "googlenet": (lambda: torchvision_model("googlenet"), 96, 9),
    "inception_v3": (lambda: torchvision_model("inception_v3"), 299, 9),
    "hrnet_w18": (lambda: timm_model("hrnet_w18"), 64, 8),
    "nasnetalarge": (lambda: timm_model("nasnetalarge", stem_size=16, num_features=24 * 16), 96, 10),
    "crossvit_tiny_240": (lambda: timm_model("crossvit_tiny_240"), 240, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_loss_curve(on_gpu: Coordinator, name: str) -> None:
    way, size_px, regions = NETWORKS[name]
    make = way()
    torch.manual_seed(0)
    plain = make().to("cuda", torch.float64)
    fast = on_lanes(copy.deepcopy(plain), 3)
    report.graphs.clear()
    curves = [curve(model, size_px) for model in (plain, fast)]
    assert pool.lost(on_gpu) == {}
    assert curves[1] == pytest.approx(curves[0], rel=TOLERANCE)
    on_workers = [region for graph in report.graphs for region in graph.regions if any(region.lanes)]
    assert len(on_workers) >= regions
    assert all(region.calls >= STEPS - 2 for region in on_workers)


def curve(model: nn.Module, size_px: int) -> list[float]:
    """The losses of 20 optimizer steps on the same random pictures."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, size_px, size_px, generator=generator).to("cuda", torch.float64)
    labels = torch.randint(10, (8,), generator=generator).cuda()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(outputs: Tensor | tuple[Tensor | None, ...], labels: Tensor) -> Tensor:
    """The mean over all heads: GoogLeNet and Inception v3 have auxiliary ones."""
    heads = [outputs] if isinstance(outputs, Tensor) else [head for head in outputs if head is not None]
    return torch.stack([nn.functional.cross_entropy(head, labels) for head in heads]).mean()
