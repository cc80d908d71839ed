"""The library behind an adapter: imported when it is first asked for, and held against what was written for it.

A library changes its functions from release to release, and an argument that has moved is a wrong number, not
an error. So an adapter says what it calls, as a class of function stubs, and the library's signatures are
compared with it before the first call; a difference is a reason that shows both.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

import torch

from attnplug import Feature

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Adapter:
    """What every adapter shares: its library, and whether it is one that the adapter was written for.

    Args:
        library: the library's module, or its name, which is imported when it is first asked for.

    Attributes:
        interfaces: what the adapter calls, as classes whose static methods have the functions' signatures, and
            whose classes have those of methods; one for each form that the library has had, the newest first.
    """

    interfaces: ClassVar[tuple[type, ...]] = ()

    def __init__(self, library: ModuleType | str) -> None:
        self._library = library

    @property
    def name(self) -> str:
        """The name of the library's module."""
        return self._library if isinstance(self._library, str) else self._library.__name__

    @cached_property
    def library(self) -> Any:
        """The library's module."""
        return importlib.import_module(self._library) if isinstance(self._library, str) else self._library

    @cached_property
    def interface(self) -> type | None:
        """The one of `interfaces` that the library has; None if it has another."""
        return next((item for item in self.interfaces if not differences(self.library, item)), None)

    @cached_property
    def _faults(self) -> tuple[str, ...]:
        try:
            library = self.library
        except Exception as error:  # whatever a broken build raises is a reason, and breaks nothing else
            return (f"{self.name} could not be imported: {type(error).__name__}: {error}",)
        return () if self.interface is not None else differences(library, self.interfaces[0])

    def lacks(self, device: torch.device, dtype: torch.dtype) -> Mapping[Feature, str]:
        """Return the declared features that the installed release does not have; see `attnplug.Kernel`."""
        return {}

    def unavailable(self) -> tuple[str, ...]:
        """Return why the library cannot be used here: it does not import, or has other functions."""
        return self._faults


def differences(library: ModuleType, interface: type) -> tuple[str, ...]:
    """Return how each function of `library` differs from its stub in `interface`; none if calls fit."""
    found = (_difference(library, name, stub) for name, stub in _stubs(interface))
    return tuple(reason for reason in found if reason)


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's parameters without annotations; of a custom operator those of what it was made from."""
    function = getattr(function, "_init_fn", function)
    parameters = inspect.signature(function).parameters.values()
    return inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])


def fits(found: inspect.Signature, expected: inspect.Signature) -> bool:
    """Whether calls written for `expected` mean the same to `found`.

    Arguments that a release adds behind the others, with a default, change nothing. An argument that only
    `**kwargs` would take is swallowed, so it does not fit; nor does one whose default has changed.
    """
    wanted = list(expected.parameters.values())
    leading = [parameter for parameter in wanted if parameter.default is inspect.Parameter.empty]
    if list(found.parameters)[: len(leading)] != [parameter.name for parameter in leading]:
        return False
    for parameter in wanted:
        other = found.parameters.get(parameter.name)
        if other is None or other.default != parameter.default:
            return False
        by_name = parameter.default is not parameter.empty  # adapters pass what has a default by its name
        if other.kind != parameter.kind and not (by_name and other.kind in _NAMED):
            return False
    added = (other for name, other in found.parameters.items() if name not in expected.parameters)
    return all(other.default is not other.empty or other.kind in _VARIADIC for other in added)


def _difference(library: ModuleType, name: str, stub: Callable[..., Any]) -> str:
    function: Any = library
    for part in name.split("."):
        function = getattr(function, part, None)
    expected = signature(stub)
    if function is None:
        return f"{library.__name__} has no {name}; written for {name}{expected}"
    found = signature(function)
    if fits(found, expected):
        return ""
    return f"{library.__name__}.{name} has changed: written for {name}{expected}, found {name}{found}"


def _stubs(interface: type, within: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the functions of an interface, and the methods of its classes, by their dotted names."""
    for name, member in vars(interface).items():
        if isinstance(member, staticmethod):
            yield within + name, member.__func__
        elif inspect.isclass(member):
            yield from _stubs(member, f"{within}{name}.")
        elif within and inspect.isfunction(member):
            yield within + name, member
