"""Looking at the registry and adding to it; nothing here imports torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from operator import index  # under a trace it makes a symbolic size a constant, with a guard

from attnplug._registry.registry import PROGRAM
from attnplug._selection.state import process, start
from attnplug._tables import WIDTH, html_table, table
from attnplug._tracing import constant_in_traces
from attnplug._types import ImplRecord, ImplSpec, family

_HEADERS = ("name", "family", "distribution", "status", "reason")


def register_impl(spec: ImplSpec, *, replace: bool = False) -> None:
    """Add an implementation from a program, with no package. It is chosen like a plugin's.

    Args:
        spec: its name, kernel, family and capabilities.
        replace: takes the place of an implementation that a program registered under this name, as a cell of a
            notebook does that runs again. Those that are built in or installed are not replaced.

    Raises:
        TypeError: `spec` is not an `ImplSpec`, or `replace` is not a bool.
        ValueError: the implementation to be replaced is active.
        DuplicateImplementationError: its name is taken.

    Examples:
        >>> import torch, attnplug
        >>> def forward(params):
        ...     weights = torch.softmax(params.scale * params.query @ params.key.mT, -1)
        ...     return weights @ params.value, None
        >>> spec = attnplug.ImplSpec(name="mine", kernel=forward, backend=attnplug.SDPBackend.MATH, priority=-200)
        >>> attnplug.register_impl(spec)
        >>> query = torch.randn(1, 2, 4, 8)
        >>> attnplug.scaled_dot_product_attention(query, query, query, impl="mine").shape
        torch.Size([1, 2, 4, 8])
        >>> attnplug.unregister_impl("mine")
    """
    if not isinstance(spec, ImplSpec):
        raise TypeError(f"spec: expected an ImplSpec, got {type(spec).__name__}")
    if not isinstance(replace, bool):
        raise TypeError(f"replace: expected a bool, got {replace!r}")
    if replace and spec.name == process.activation:
        raise ValueError(f"spec: {spec.name!r} is active; restore_flash_attention_impl() first")
    _in_step()  # where PyTorch is there, exported programs find the operator from here on
    start().add(spec, PROGRAM, replace=replace)


def unregister_impl(name: str) -> None:
    """Remove an implementation that was added with `register_impl` or `register_flash_attention_impl`.

    Args:
        name: of the implementation.

    Raises:
        UnknownImplementationError: there is none of this name.
        ValueError: it is built in, comes from an installed package, or is active.
    """
    if isinstance(name, str) and name == process.activation:
        raise ValueError(f"name: {name!r} is active; restore_flash_attention_impl() first")
    start().remove(name)


class ImplList(list[ImplRecord]):
    """A list of records that is shown as a table: 80 columns in a terminal, HTML in a notebook."""

    def __repr__(self) -> str:
        return table(_HEADERS, self._rows(), WIDTH, ("distribution",))

    def _repr_html_(self) -> str:
        return html_table(_HEADERS, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                record.name,
                family(record.backend),
                f"{record.distribution} {record.version}".rstrip(),
                record.status,
                record.reason,
            )
            for record in self
        ]


def list_impls() -> list[ImplRecord]:
    """Return a record for each implementation, in the order of preference, and for what cannot be used, last.

    Those are plugins that are broken or that the environment keeps from loading, under their entry points' names, and
    implementations whose name several distributions claim.
    """
    _in_step()
    assert process.registry is not None
    return ImplList(_records(index(process.registry.generation)))


@constant_in_traces
def _records(generation: int) -> tuple[ImplRecord, ...]:
    """Return the records; in a trace they are a constant of this generation, on which it has a guard."""
    return tuple(start().records())


def check_name(name: str, where: str = "", also: Iterable[str] = ()) -> None:
    """Raise what a call with `impl=name` would raise if there is no such implementation; `also` would do too."""
    if name not in also:
        start().get(name, where, also)


def list_flash_attention_impls() -> list[str]:
    """Return the sorted names of all registered implementations: built in, discovered and registered."""
    _in_step()
    assert process.registry is not None
    return process.registry.names()


@constant_in_traces
def _in_step() -> None:
    """Fill the registry and bring PyTorch's into step with it, if PyTorch has been imported."""
    if "torch.nn.attention" in sys.modules:
        importlib.import_module("attnplug._control.torch_registry").refresh()
    start()
