"""Ranks that call differently read each other's messages amiss; the first call of a group says so, for no message.

What a rank asks for lies in the store of the group, and whoever comes later reads it: nobody waits. A rank and its
neighbours of the ring are compared, so that of any difference one rank or more learns; it raises before it sends
anything, and those that wait for it say why it does not answer.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from attnplug._types import SDPAParams
from attnplug.parallel._exchange import store_of

_compared: set[tuple[dist.ProcessGroup, str]] = set()


def check_alike(group: dist.ProcessGroup, method: str, params: SDPAParams) -> None:
    """Compare this call, if it is the group's first of its method, with what neighbours have said of theirs.

    Raises:
        ValueError: a neighbour's differs; the message names the argument.
    """
    if (group, method) in _compared:
        return
    # A store may outlive its groups, and the next ones have their names.
    before = sum(earlier.group_name == group.group_name and of == method for earlier, of in _compared)
    _compared.add((group, method))
    place = f"{method}/{before}"
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    asked = _asked(params)
    for neighbour in {(rank - 1) % ranks, (rank + 1) % ranks} - {rank}:
        for name, other in _exchanged(group, place, rank, neighbour, asked).items():
            if other != asked[name]:
                raise ValueError(
                    f"{name}: is {asked[name]} here and {other} on rank {neighbour} of the group; "
                    "all ranks must call alike, with parts of one sequence"
                )


def _exchanged(
    group: dist.ProcessGroup, place: str, rank: int, neighbour: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Say what this rank asks for, and return what its neighbour does; nothing if it has not come so far."""
    with suppress(Exception):  # a group without a store, or one that is gone, which a message will tell
        store = store_of(group)
        store.set(f"{place}/{rank}", json.dumps(asked))
        if store.check([f"{place}/{neighbour}"]):
            found: dict[str, Any] = json.loads(store.get(f"{place}/{neighbour}"))
            return found
    return {}


def _asked(params: SDPAParams) -> dict[str, Any]:
    """Return what must be the same on each rank, as JSON has it; lengths may differ."""
    query, key, value = params.query, params.key, params.value
    asked = {
        "query, key, value": str(query.dtype),
        "heads of query and of key": [query.shape[1], key.shape[1]],
        "head sizes of key and of value": [key.shape[-1], value.shape[-1]],
        **{name: getattr(params, name) for name in ("is_causal", "scale", "softcap")},
        "window_size": list(params.window_size),
        "dropout_p": params.dropout,
    }
    if not params.is_varlen:
        asked["batch of query"] = query.shape[0]
    return asked
