"""The zoo: every model of torchvision and one of every timm family, untrained, on the smallest input that they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

BATCH = 2
SIZES_PX = (64, 96, 128, 160, 192, 224, 240, 256, 299, 320, 384, 448, 512)
MOST_FLOAT64_PARAMETERS = 100_000_000  # larger networks are compared in float32, for want of memory
FIRST = (
    "torchvision/googlenet", "torchvision/inception_v3", "timm/inception_resnet_v2", "timm/hrnet_w18",
    "timm/nasnetalarge", "timm/pnasnet5large", "timm/crossvit_tiny_240", "timm/dpn48b", "timm/ghostnet_050",
)  # fmt: skip
# Where the name does not tell which member of a family is the smallest, or another one is better known.
CHOSEN = {
    "hrnet": "hrnet_w18",
    "crossvit": "crossvit_tiny_240",
    "resnet": "resnet18",
    "efficientnet": "efficientnet_b0",
    "dla": "dla34",
    "ghostnet": "ghostnet_050",
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256",
    "cspnet": "cspresnet50",
    "metaformer": "poolformer_s12",
    "naflexvit": "naflexvit_base_patch16_gap",
    "levit": "levit_128s",
    "iformer": "iformer_t",
    "res2net": "res2net50_14w_8s",
}
# Narrower or shallower than published: the same code, and the same regions in each block.
SMALLER: dict[str, dict[str, Any]] = {
    "nasnetalarge": {"stem_size": 16, "num_features": 24 * 16},
    "deepseek_vit_412m": {"depth": 4},
}
# Sizes in the order in which names tell them; a name without one stands in the middle.
WORDS = ("atto", "femto", "pico", "nano", "zepto", "xxs", "xxt", "xs", "tiny", "mini", "small")
LARGE = ("base", "medium", "large", "huge", "giant", "xl", "so400m", "l", "m", "xxl")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: `name` is "torchvision/..." or "timm/...", `family` what --family selects by."""

    name: str
    family: str

    @property
    def short(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Specimen:
    """A network that ran once, and the inputs that it ran on; `px` is the edge of an image."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    px: int

    @property
    def dtype(self) -> str:
        return str(self.inputs[0].dtype).removeprefix("torch.")


def entries() -> list[Entry]:
    """All of the zoo: the pinned ones, image classification, timm, then what needs other inputs."""
    vision = [Entry(f"torchvision/{name}", _kind(name)) for name in _by_turns(torchvision.models.list_models())]
    small = [Entry(f"timm/{_smallest(family)}", family) for family in timm.list_modules()]
    order = [*_of(vision, "classification"), *small]
    order += [entry for kind in KINDS[1:] for entry in _of(vision, kind)]
    first = [entry for name in FIRST for entry in order if entry.name == name]
    return [*first, *(entry for entry in order if entry.name not in FIRST)]


def specimen(entry: Entry) -> Specimen:
    """The first of the smallest ways to build and call a network; raises the last failure where there is none."""
    failure: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for px, make in _ways(entry):
            try:
                return _tried(make, entry, px, dtype)
            except Exception as error:  # noqa: BLE001 - too small an input fails in many ways
                failure = error
    raise RuntimeError(f"no way to call it: {type(failure).__name__}: {failure}") from failure


KINDS = ("classification", "quantization", "segmentation", "video", "optical_flow", "detection")


def _kind(name: str) -> str:
    module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    kind = module.partition(".")[0]
    return kind if kind in KINDS else "classification"


def _of(known: list[Entry], kind: str) -> list[Entry]:
    return [entry for entry in known if entry.family == kind]


def _by_turns(names: list[str]) -> list[str]:
    """The smallest of each file first, then the second of each: variety early, large networks last."""
    files: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        builder = torchvision.models.get_model_builder(name)
        files.setdefault(builder.__module__, []).append((_parameters(name), name))
    turns = [(turn, *found) for file in files.values() for turn, found in enumerate(sorted(file))]
    return [name for _, _, name in sorted(turns)]


def _parameters(name: str) -> int:
    weights = [*torchvision.models.get_model_weights(name)]
    return weights[0].meta.get("num_params", 0) if weights else 0


def _smallest(family: str) -> str:
    names = timm.list_models(module=family)
    return CHOSEN.get(family) or min(names, key=_size_told)


def _size_told(name: str) -> tuple[bool, int, int, int, str]:
    """Smaller for names that say so; test models are cut down so far that they fork no more."""
    words = name.split("_")
    ranks = [WORDS.index(word) for word in words if word in WORDS]
    rank = min(ranks) if ranks else len(WORDS) + any(word in LARGE for word in words)
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return name.startswith("test_"), rank, numbers[0] if numbers else 0, len(name), name


Maker = Callable[[], nn.Module]


def _ways(entry: Entry) -> Iterator[tuple[int, Maker]]:
    """Sizes of images and how to build for them, the cheapest first."""
    kind, name = entry.name.split("/")
    if kind == "timm":
        yield from _timm_ways(name)
        return
    options: dict[str, Any] = {"weights": None}
    if entry.family in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = False
    for px in SIZES_PX:
        if entry.family == "detection":
            limits = {} if name.startswith("ssd") else {"min_size": px, "max_size": px}
            yield px, lambda limits=limits: Detector(torchvision.models.get_model(name, **options, **limits))
        else:
            yield px, lambda: torchvision.models.get_model(name, **options)


def _timm_ways(name: str) -> Iterator[tuple[int, Maker]]:
    extra = SMALLER.get(name, {})
    for px in SIZES_PX[:4]:
        yield px, lambda px=px: timm.create_model(name, img_size=px, **extra)
    for px in SIZES_PX:
        yield px, lambda: timm.create_model(name, **extra)


def _tried(make: Maker, entry: Entry, px: int, dtype: torch.dtype) -> Specimen:
    torch.manual_seed(0)
    model = make()
    if dtype == torch.float64 and sum(p.numel() for p in model.parameters()) > MOST_FLOAT64_PARAMETERS:
        raise MemoryError("too large for float64")
    inputs = tuple(value.to(dtype) for value in _inputs(entry, px))
    _shake(model.to(dtype).train())
    with torch.no_grad():
        model(*inputs)
    return Specimen(model, inputs, px)


def _shake(model: nn.Module) -> None:
    """Give constant parameters (zero, one, layer scales of 1e-6) values: behind a zero no gradient would be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _inputs(entry: Entry, px: int) -> tuple[Tensor, ...]:
    if entry.family == "video":
        return (torch.randn(1, 3, 16, px, px),)
    if entry.family == "optical_flow":
        return torch.rand(1, 3, px, px) * 2 - 1, torch.rand(1, 3, px, px) * 2 - 1
    if entry.family == "detection":
        return (torch.rand(BATCH, 3, px, px),)
    return (torch.randn(BATCH, 3, px, px),)


class Detector(nn.Module):
    """A detection network with the boxes, masks and key points that it trains on: two people an image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.network(list(images), [_objects(image) for image in images])


def _objects(image: Tensor) -> dict[str, Tensor]:
    px = image.shape[-1]
    boxes = image.new_tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.9]]) * px
    masks = torch.zeros(2, px, px, dtype=torch.uint8)
    masks[:, px // 4 : px // 2, px // 4 : px // 2] = 1
    points = torch.cat([boxes[:, None, :2].expand(2, 17, 2) + 1, boxes.new_ones(2, 17, 1)], dim=2)
    return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points}
