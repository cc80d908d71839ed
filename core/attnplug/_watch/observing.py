"""What `verify` and `summary` have in common: they observe calls, of a `with` block or of the process."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from attnplug._errors import ScopeError
from attnplug._selection.watching import UNROUTED, Watcher, add_watcher, remove_watcher

UNSEEN = UNROUTED, "a `with` block sees the calls of its own thread, start() those of all threads"
"""What is said where no call was seen."""

_Observer = TypeVar("_Observer", bound="Observer")


class Observer(ABC):
    """Base class of what observes the calls of its thread as a `with` block, and of all from `start()` to `stop()`."""

    _watcher: WatcherOf[Any] | None = None

    def _is_idle(self) -> bool:
        """Whether it need not be told of calls, as it would do nothing."""
        return False

    @abstractmethod
    def _new_watcher(self, everywhere: bool) -> WatcherOf[Any]:
        """Return what observes for it."""

    def start(self: _Observer) -> _Observer:
        """Observe the calls of every thread, until `stop()`; returns itself."""
        return self._begin(everywhere=True)

    def stop(self) -> None:
        """Observe no longer. What was found stays."""
        if self._watcher is None:
            raise ScopeError(f"{type(self).__name__} is stopped, or left, but it was not started")
        remove_watcher(self._watcher)
        self._watcher = None  # afterwards: what is interrupted before can be repeated

    def __enter__(self: _Observer) -> _Observer:
        return self._begin(everywhere=False)

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __del__(self) -> None:
        """Leave a block that can no longer be left by hand, because leaving it was interrupted."""
        if self._watcher is not None and not self._watcher.everywhere:
            remove_watcher(self._watcher)

    def _begin(self: _Observer, everywhere: bool) -> _Observer:
        if self._watcher is not None:
            raise ScopeError(f"this {type(self).__name__} is started already; make another one")
        self._watcher = self._new_watcher(everywhere)
        if not self._is_idle():
            add_watcher(self._watcher, everywhere)
        return self


class WatcherOf(Watcher, Generic[_Observer]):
    """Observes for an `Observer`, from when that is started until it is stopped.

    That of a process holds its observer, which nobody else need do. That of a block does not, so that the block can be
    collected, and is left then.
    """

    def __init__(self, observer: _Observer, everywhere: bool) -> None:
        self._kept = observer if everywhere else None
        self.observer = weakref.ref(observer)
        self.everywhere = everywhere
