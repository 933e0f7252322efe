"""Whether the workers still see the parameters and buffers of a lowered graph where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from mpsrun.run.specialize import Strand


class Binding:
    """The statics of all strands of one lowered graph, looked at once a call: during it, its arguments hold them."""

    def __init__(self, strands: Sequence[Strand], position: Mapping[fx.Node, int]) -> None:
        """`position`: by placeholder, the number of the graph's argument."""
        self._places = [
            {arg: position[strand.args[arg]] for share in strand.crossing.shares for arg in share.static_args}
            for strand in strands
        ]
        self._strands = tuple(strands)
        self._statics = sorted({place for places in self._places for place in places.values()})
        self._pointers: list[int] = []
        self._chunks: tuple[int, ...] = ()

    def follow(self, args: Sequence[Any]) -> None:
        """Tell the workers what moved since the last call. Raises `NotShippable` where they cannot see it."""
        if not self._strands:
            return
        owner = self._strands[0].crossing.owner
        pointers = [args[i].data_ptr() for i in self._statics]
        if pointers == self._pointers and owner.device.holds(self._chunks):
            return
        with owner.lock:
            for strand, places in zip(self._strands, self._places, strict=True):
                owner.setup.bind(strand.crossing, {arg: args[place] for arg, place in places.items()})
        shares = [share for strand in self._strands for share in strand.crossing.shares]
        self._chunks = tuple({chunk for share in shares for chunk in share.chunks})
        self._pointers = pointers
