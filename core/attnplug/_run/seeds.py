"""Random numbers of dropout that are different on each rank, and in each block, whatever the ranks were seeded with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def drawn_seed(device: torch.device) -> int:
    """Return a number from the default generator of a device, which goes on from there; nothing waits for a GPU."""
    if device.type == "cpu":
        return int(torch.randint(2**62, (), device="cpu"))
    generator = torch.get_device_module(device).default_generators[device.index or 0]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return random.Random(f"{generator.initial_seed()} {offset}").getrandbits(62)


@contextmanager
def seeded(device: torch.device, seed: int, *place: int) -> Iterator[None]:
    """Draw, within the block, numbers that follow from a seed and a place; the generator is put back afterwards."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(random.Random(f"{seed} {place}").getrandbits(62))
        yield
