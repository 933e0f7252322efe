"""Which regions the finder gives for networks that nobody here wrote, checked by reading their code.

Needs torchvision and timm; without them it is skipped.
"""

import pytest
import torch
from torch import fx

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from benchmarks.zoo_models import Entry, specimen
from mpsrun.graph.effects import analyze, drop_inert
from mpsrun.graph.regions import Regions, find_regions

# By number of branches, how many regions. All are trained: auxiliary classifiers take part.
PINS = {
    # Nine Inception blocks. Both auxiliary classifiers fork, too, but have dropout on either side: refused on a CPU.
    "torchvision/googlenet": {4: 9},
    # Blocks A, A, A, C, C, C, C, E, E; the reductions B and D; two forks inside each E, and the auxiliary classifier.
    "torchvision/inception_v3": {4: 9, 3: 2, 2: 5},
    # Mixed_5b and mixed_7a; ten block35 and mixed_6a; twenty block17 and ten block8. A shortcut is no branch.
    "timm/inception_resnet_v2": {4: 2, 3: 11, 2: 30},
    # Stages of two, three and four resolutions, by turns with their fuse layers (12 paths between four resolutions);
    # shortcuts of 1x1 convolutions in the first stage and in the head.
    "timm/hrnet_w18": {12: 3, 6: 3, 5: 1, 4: 4, 3: 4, 2: 8},
    # A cell reads the two before it, so that its left half runs beside the right half of its predecessor: eight
    # branches, eleven beside a reduction. Two 1x1 convolutions before each.
    "timm/nasnetalarge": {11: 2, 9: 1, 8: 15, 7: 1, 5: 1, 4: 2, 3: 3, 2: 24},
    # As NASNet, but for the third pair of each of the 13 cells, which is a fork inside a branch.
    "timm/pnasnet5large": {8: 13, 5: 2, 2: 30},
    # Two scales in each of three blocks and before them, two projections between; in each of six cross attentions
    # the values beside the scores, the keys beside the queries.
    "timm/crossvit_tiny_240": {2: 19},
    # Two 1x1 convolutions at the end of each of 16 blocks; the shortcut convolution of four of them.
    "timm/dpn48b": {2: 20},
    # A ghost module's cheap half reads its other half: no fork. Five shortcuts of depthwise convolutions.
    "timm/ghostnet_050": {2: 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PINS)
@pytest.mark.filterwarnings("ignore")
def test_regions_of(name: str) -> None:
    found = regions_of(name)
    widths = [len(region.branches) for region in found.regions]
    assert {width: widths.count(width) for width in widths} == PINS[name]


def regions_of(name: str) -> Regions:
    """The regions of a network of the zoo, which compiles to one graph."""
    graphs: list[Regions] = []

    def find(gm: fx.GraphModule, _: object) -> object:
        drop_inert(gm)
        graphs.append(find_regions(gm, analyze(gm)))
        return gm.forward

    there = specimen(Entry(name, ""))
    torch.compile(there.model, backend=find)(*there.inputs)
    (found,) = graphs
    return found
