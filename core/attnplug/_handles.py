"""What undoes something, by hand or at the end of a `with` block."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

_Handle = TypeVar("_Handle", bound="Removable")


class Removable(ABC):
    """Base class of handles: entered, one is itself; left, it is removed.

    One that was not entered may be forgotten: what it is the handle of stays in place.
    """

    _is_entered = False

    @abstractmethod
    def remove(self) -> None:
        """Undo what this is the handle of; a second call does nothing."""

    def __enter__(self: _Handle) -> _Handle:
        self._is_entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
        self._is_entered = False

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave a block that can no longer be left by hand, because leaving it was interrupted.

        At the end of the process modules are gone already, and nothing has to be put back.
        """
        if self._is_entered and not is_finalizing():
            self.remove()

    def __getstate__(self) -> Any:
        """Return what a copy has, which is entered by nobody."""
        return {name: value for name, value in self.__dict__.items() if name != "_is_entered"}
