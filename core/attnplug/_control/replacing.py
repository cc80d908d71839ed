"""A function of PyTorch's replaced where Python code finds it: in its module, and in all that imported it by name."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from itertools import repeat
from operator import is_
from types import ModuleType
from typing import Any


class Replacement:
    """One function, what stands in its place, and where. Either all places have the one or all the other."""

    def __init__(self, original: Any, replaced: Any) -> None:
        self.original, self.replaced = original, replaced
        self._places: list[tuple[dict[str, Any], str]] = []
        self._seen: set[str] = set()

    def install(self) -> None:
        """Put the replacement in place."""
        self._seen.clear()
        self._places.clear()
        self._find(self.original)
        self._put(self.replaced)

    def uninstall(self) -> None:
        """Put the original back, also in modules that have imported the replacement since.

        What is interrupted here goes on where it was when this is called again.
        """
        self._find(self.replaced)
        self._put(self.original)

    def _find(self, function: Any) -> None:
        """Find the names of a function in the modules not yet seen, apart from PyTorch's bindings and attnplug itself.

        Runs in C for all but the few modules that hold it: there are some 100,000 names.
        """
        for name, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", None)
            if name in self._seen or not names or name.partition(".")[0] == "attnplug" or name.startswith("torch._C"):
                continue
            if True in map(is_, list(names.values()), repeat(function)):
                self._places += [(names, attribute) for attribute, value in list(names.items()) if value is function]
            self._seen.add(name)

    def _put(self, function: Any) -> None:
        """Put this function in all places, except those that have been given another one since."""
        for names, attribute in self._places:
            value = names.get(attribute)
            if value is self.original or value is self.replaced:
                names[attribute] = function


class AfterImport(importlib.abc.MetaPathFinder):
    """Tell a listener of a module when it is imported: to import it here might cost seconds."""

    def __init__(self, name: str, listener: Callable[[ModuleType], None]) -> None:
        self._name, self._listener = name, listener

    def install(self) -> None:
        """Listen, or tell at once of a module that is there."""
        if self._name in sys.modules:
            self._listener(sys.modules[self._name])
        else:
            sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute, loader = spec.loader.exec_module, spec.loader

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._listener(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec
