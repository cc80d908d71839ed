"""Locks that a fork waits for.

A child has only the thread that forked: a lock that another thread held would never be free there, and what the
lock protects would be half done. So a fork waits until nobody holds one, as Python's own does for its import lock.
"""

from __future__ import annotations

import os
import threading
from operator import itemgetter
from weakref import WeakKeyDictionary

ACTIVATION, START, DISCOVERY, KERNEL, PATCH, BINDING, REGISTRY = range(7)
"""The order in which a thread that needs several takes them."""

_locks: WeakKeyDictionary[threading.RLock, int] = WeakKeyDictionary()
_held: list[threading.RLock] = []
_changing = threading.Lock()


def lock(rank: int) -> threading.RLock:
    """Return a new lock that a thread may take again while it has it."""
    made = threading.RLock()
    with _changing:
        _locks[made] = rank
    return made


def _hold() -> None:
    with _changing:
        ranked = sorted(_locks.items(), key=itemgetter(1))
    for held, _ in ranked:
        held.acquire()
    _changing.acquire()
    _held[:] = [held for held, _ in ranked]


def _release() -> None:
    held = list(_held)
    _held.clear()
    _changing.release()
    for one in reversed(held):
        one.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
