"""Ranks that call differently read each other's messages amiss; the first call of a group says so, for no message.

Two neighbours of the ring have a place in the store of the group. Who comes first leaves there what it asks for and
goes on; the other takes it away, compares, and raises before it sends anything. Nobody waits, but those that wait for
one that has raised, and they say why it does not answer.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from attnplug._types import SDPAParams
from attnplug.parallel._exchange import store_of

_compared: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()
"""The methods of which a group's first call has been compared."""


def check_alike(group: dist.ProcessGroup, method: str, params: SDPAParams) -> None:
    """Compare this call, if it is the group's first of its method, with those of neighbours that have come before.

    Raises:
        ValueError: a neighbour's differs; the message names the argument.
    """
    compared = _compared.setdefault(group, set())
    if method in compared:
        return
    compared.add(method)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    asked = _asked(params)
    neighbours = {(rank - 1) % ranks, (rank + 1) % ranks} - {rank}
    # All, before any error: what one has left is taken away, and each that comes later is told.
    found = {neighbour: _exchanged(group, f"{method}/{{}}-{{}}", rank, neighbour, asked) for neighbour in neighbours}
    for neighbour, others in found.items():
        for name, other in others.items():
            if other != asked[name]:
                raise ValueError(
                    f"{name}: is {asked[name]} here and {other} on rank {neighbour} of the group; "
                    "all ranks must call alike, with parts of one sequence"
                )


def _exchanged(
    group: dist.ProcessGroup, place: str, rank: int, neighbour: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Return what a neighbour asks for, if it has come before; else leave there what this rank does."""
    mine, place = json.dumps({"rank": rank, **asked}), place.format(*sorted((rank, neighbour)))
    with suppress(Exception):  # a group without a store, or one that is gone, which a message will tell
        store = store_of(group)
        there = store.compare_set(place, "", mine).decode()
        if there != mine:
            store.delete_key(place)
            found: dict[str, Any] = json.loads(there)
            del found["rank"]
            return found
    return {}


def _asked(params: SDPAParams) -> dict[str, Any]:
    """Return what must be the same on each rank, as JSON has it; lengths may differ."""
    query, key, value = params.query, params.key, params.value
    return {
        "packed sequences": params.is_varlen,
        "query, key, value": str(query.dtype),
        "heads of query and of key": [query.shape[1], key.shape[1]],
        "head sizes of key and of value": [key.shape[-1], value.shape[-1]],
        **{name: getattr(params, name) for name in ("is_causal", "scale", "softcap")},
        "window_size": list(params.window_size),
        "dropout_p": params.dropout,
        "batch of query": None if params.is_varlen else query.shape[0],
    }
