"""One world of processes for each number of ranks: each start imports torch, and takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from ranks import World

collect_ignore_glob = [] if dist.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    """Return the world of so many ranks."""
    worlds: dict[int, World] = {}

    def get(ranks: int) -> World:
        if ranks not in worlds:
            worlds[ranks] = World(ranks, tmp_path_factory.mktemp(f"world{ranks}"))
        return worlds[ranks]

    yield get
    for made in worlds.values():
        made.close()
