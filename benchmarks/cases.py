"""The networks that are measured, with their batches, inputs and losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples import networks


@dataclass(frozen=True)
class Input:
    """One input of a network: its shape without the batch; integers from 0 where `below` is given, else normal."""

    shape: tuple[int, ...]
    below: int | None = None

    def make(self, batch: int, generator: torch.Generator) -> Tensor:
        """A batch in the CPU's memory."""
        shape = (batch, *self.shape)
        if self.below is None:
            return torch.randn(shape, generator=generator)
        return torch.randint(self.below, shape, generator=generator)


def mean_square(output: Tensor) -> Tensor:
    """A loss that needs no labels."""
    return output.float().square().mean()


@dataclass(frozen=True)
class Network:
    """A network and the batches that it is measured with, from launch-bound to saturating.

    needs: the package that it comes from, where that is not ours. chain: it has no branches to speak of.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    batches: tuple[int, ...]
    loss: Callable[[Any], Tensor] = mean_square
    bf16: bool = False
    needs: str = "torch"
    chain: bool = False


@dataclass(frozen=True)
class Case:
    """A network and one batch."""

    network: str
    batch: int
    of: Network

    @property
    def name(self) -> str:
        return f"{self.network}-{self.batch}"

    def why_not_here(self) -> str | None:
        """Why it cannot be measured here; None where it can."""
        return None if importlib.util.find_spec(self.of.needs) else f"{self.of.needs} is not installed"

    def make_inputs(self) -> list[Tensor]:
        """The same batch each time, in the CPU's memory."""
        generator = torch.Generator().manual_seed(1)
        return [given.make(self.batch, generator) for given in self.of.inputs]


def inception_v3() -> nn.Module:
    """Without its auxiliary classifier, and without dropout so that engines can be compared."""
    import torchvision

    return torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False, dropout=0.0)


def resnet50() -> nn.Module:
    """A chain: its only forks are the shortcuts' convolutions."""
    import torchvision

    return torchvision.models.resnet50(weights=None)


def hrnet() -> nn.Module:
    """Up to four resolutions side by side."""
    import timm

    return timm.create_model("hrnet_w18")


PHOTOGRAPH, SMALL_IMAGE, SEQUENCE = Input((3, 224, 224)), Input((3, 32, 32)), Input((128, 64))
TEXT = Input((64,), below=8192)

NETWORKS = {
    "googlenet": Network(lambda: networks.GoogLeNet(1000), (PHOTOGRAPH,), (8, 64)),
    "inception": Network(inception_v3, (Input((3, 299, 299)),), (8, 32), needs="torchvision"),
    "pathnet": Network(networks.PathNet, (SMALL_IMAGE,), (32, 128)),
    "towers": Network(networks.Towers, (SEQUENCE,), (4, 16)),
    "towers-bf16": Network(networks.Towers, (SEQUENCE,), (32,), bf16=True),
    "two-towers": Network(networks.TwoTowers, (Input((3, 96, 96)), TEXT), (16, 64), loss=networks.contrastive_loss),
    "hrnet": Network(hrnet, (PHOTOGRAPH,), (8, 32), needs="timm"),
    "ensemble": Network(networks.Ensemble, (SMALL_IMAGE,), (32, 128)),
    "resnet50": Network(resnet50, (PHOTOGRAPH,), (8, 64), needs="torchvision", chain=True),
    "wide": Network(networks.Wide, (Input((2**20,)),), (8,)),
}
# For trying the benchmark itself, also on a CPU; measured only when it is asked for.
TRIAL = {"trial": Network(lambda: networks.Ensemble((4, 6, 8), depth=1), (Input((3, 8, 8)),), (4,))}


def chosen(names: Sequence[str] | None) -> list[Case]:
    """The cases of these names, "googlenet" or "googlenet-8"; all but the trial where there are no names.

    Raises ValueError for a name that does not exist.
    """
    everything = [
        Case(name, batch, network) for name, network in (NETWORKS | TRIAL).items() for batch in network.batches
    ]
    if names is None:
        return [case for case in everything if case.network in NETWORKS]
    known = {case.name for case in everything} | {case.network for case in everything}
    if unknown := set(names) - known:
        raise ValueError(f"expected networks among {', '.join(sorted(known))}; found {', '.join(sorted(unknown))}")
    return [case for case in everything if case.name in names or case.network in names]
