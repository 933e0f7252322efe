"""Garbage: what workers keep for objects of the lead that are gone, until a later step tells them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Literal

from mpsrun.run.link import Link

Kind = Literal["invocation", "layout", "job", "relay"]


class Garbage:
    """A queue that finalizers fill.

    They run in any thread and at any line, also inside of the coordinator's own: so they only append here. `waiting`:
    what the workers have not been told of yet.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Sequence[Link], Kind, int]] = deque()

    def abandon(self, links: Sequence[Link], invocation: int) -> None:
        """These workers will not be asked for a backward of an invocation."""
        self.waiting.append((links, "invocation", invocation))

    def forget(self, link: Link, layout: int, job: int) -> None:
        """A worker's layout, and the job behind it, will not be used again."""
        self.waiting.append(((link,), "layout", layout))
        self.waiting.append(((link,), "job", job))

    def discard(self, links: Sequence[Link], relay: int) -> None:
        """A relay will not be replayed again by these workers."""
        self.waiting.append((links, "relay", relay))

    def collect(self) -> Mapping[Link, Mapping[Kind, list[int]]]:
        """What each worker need not keep any more; it is for the caller to tell."""
        found: defaultdict[Link, defaultdict[Kind, list[int]]] = defaultdict(lambda: defaultdict(list))
        while self.waiting:
            links, kind, number = self.waiting.popleft()
            for link in links:
                found[link][kind].append(number)
        return found
