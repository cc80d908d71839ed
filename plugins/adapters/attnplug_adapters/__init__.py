"""Tells attnplug about the kernels that people already install, each behind an adapter of its own.

This module is read whenever implementations are listed, so it imports neither torch nor a library. What holds
for every release of a library stands in `specs`; what depends on its version, on how it was built, or on the
GPU is asked of the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnplug import ImplSpec, hookimpl
from attnplug_adapters.hub_pins import hub_spec
from attnplug_adapters.specs import all_specs

if TYPE_CHECKING:
    from attnplug_adapters.hub_kernels import hub

__all__ = ["attnplug_register_impls", "hub"]


@hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    """Return every implementation, installed library or not: what lacks its library is listed with the reason."""
    return [*all_specs(), hub_spec()]


def __getattr__(name: str) -> Any:
    if name == "hub":
        from attnplug_adapters.hub_kernels import hub

        return hub
    raise AttributeError(f"module 'attnplug_adapters' has no attribute {name!r}")
