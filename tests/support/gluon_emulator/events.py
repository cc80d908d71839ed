"""The order of what a program does: vector clocks, and the accesses to each buffer that they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Fault(AssertionError):
    """What a kernel does is wrong, whether or not its result is."""


# ------------------------------------------------------------------------------------------- order of events


class Clock(dict[Any, int]):
    """What has happened before: for each agent (a thread or a copy), its last step that is known of."""

    def join(self, other: Mapping[Any, int]) -> None:
        for agent, step in other.items():
            if self.get(agent, 0) < step:
                self[agent] = step

    def knows(self, event: tuple[Any, int]) -> bool:
        return self.get(event[0], 0) >= event[1]


class Cell:
    """The accesses to one buffer: who wrote it, who has read it since, and which reads are still under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: tuple[Any, int] | None = None
        self.reads: dict[Any, int] = {}
        self.reading = 0
        self.unfenced: set[Any] = set()

    def write(self, clock: Clock, event: tuple[Any, int]) -> None:
        if self.reading:
            raise Fault(f"{self.name} is written while a product or a store still reads it")
        if self.written is not None and not clock.knows(self.written):
            raise Fault(f"{self.name} is written twice, in no order")
        for read in self.reads.items():
            if not clock.knows(read):
                raise Fault(f"{self.name} is written although {read[0]} may still read it")
        self.written, self.reads = event, {}

    def read(self, clock: Clock, event: tuple[Any, int], asynchronous: bool) -> None:
        if self.written is None:
            raise Fault(f"{self.name} is read before anything was written")
        if not clock.knows(self.written):
            raise Fault(f"{self.name} is read although what {self.written[0]} writes may not be there")
        if asynchronous and self.unfenced:
            raise Fault(f"{self.name} is read by a product or a store, and what threads wrote there is not fenced")
        self.reads[event[0]] = event[1]
