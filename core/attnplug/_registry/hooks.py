"""The one hook that a plugin answers. Hooks discover; they are never called during an attention call."""

from __future__ import annotations

import pluggy

from attnplug._types import ImplSpec

PROJECT = "attnplug"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as its answer to the hook of the same name."""


@hookspec
def attnplug_register_impls() -> list[ImplSpec]:  # type: ignore[empty-body]  # plugins have the bodies
    """Return the implementations that this plugin provides.

    Called once per process, when the registry is first needed. The module that answers must import
    neither torch nor its kernels: an `ImplSpec` names its kernel by dotted path.
    """
