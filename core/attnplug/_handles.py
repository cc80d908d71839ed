"""What undoes something, by hand or at the end of a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

_Handle = TypeVar("_Handle", bound="Removable")


class Removable(ABC):
    """Base class of handles: entered, one is itself; left, it is removed."""

    @abstractmethod
    def remove(self) -> None:
        """Undo what this is the handle of; a second call does nothing."""

    def __enter__(self: _Handle) -> _Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
