"""Attention of diffusers' pipelines, chosen by attnplug.

diffusers chooses attention from a closed list of its own, `"native"` and others, and leaves an argument that the
chosen one does not know, such as a mask, to warnings at most. Behind `"native"` stands PyTorch's function, so
binding a model to a scope is enough: whatever a kernel declines goes to the next name in the scope, with
the reason in `explain`, and nothing that a call asks for is lost.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

import attnplug
from attnplug._handles import Removable

_NATIVE = "native"


class Handle(Removable):
    """Undoes `bind`; also a context manager."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __repr__(self) -> str:
        return f"<Handle: {', '.join(map(repr, self._handles)) or 'removed'}>"

    def remove(self) -> None:
        """Take the models' attention back to what it was."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()  # afterwards, so that nothing is lost if this is interrupted


def bind(pipeline: Any, backends: Any, set_priority: bool = False) -> Handle:
    """Run every attention call of a pipeline's own models, or of one model, in a scope.

    Of a pipeline these are the models of diffusers in it (`transformer`, `unet`, `vae`, `controlnet`, …); text
    encoders, which are models of transformers, are left alone.

    Args:
        pipeline: a `DiffusionPipeline`, or one model of diffusers.
        backends: as for `attnplug.sdpa_kernel`: implementations, families, or both.
        set_priority: whether their order is the order of preference.

    Returns:
        A handle whose `remove()` ends it; also a context manager.

    Raises:
        ValueError: there is no model of diffusers in `pipeline`, or diffusers is told to compute its attention with
            another backend than PyTorch's function, so that the scope would be asked nothing.

    Examples:
        >>> import attnplug.integrations.diffusers
        >>> from diffusers import FluxTransformer2DModel  # doctest: +SKIP
        >>> handle = attnplug.integrations.diffusers.bind(
        ...     pipeline, ["sage_attention", "torch"], set_priority=True
        ... )  # doctest: +SKIP
    """
    models = _models(pipeline)
    if not models:
        raise ValueError(
            f"pipeline: expected a DiffusionPipeline or a model of diffusers, got {type(pipeline).__name__}"
        )
    for name, model in models.items():
        _assert_native(name, model)
    handle = Handle()
    try:
        handle._handles.append(attnplug.patch_torch())
        for model in models.values():
            handle._handles.append(attnplug.bind(model, backends, set_priority))
        return handle
    except BaseException:  # an interrupt, too, must leave nothing bound
        handle.remove()
        raise


def _models(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Return the models of diffusers in a pipeline, by name."""
    model_class = importlib.import_module("diffusers").ModelMixin
    if isinstance(pipeline, model_class):
        return {type(pipeline).__name__: pipeline}
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        return {}
    return {name: part for name, part in components.items() if isinstance(part, model_class)}


def _assert_native(name: str, model: torch.nn.Module) -> None:
    """Raise if attention of this model does not end in PyTorch's function."""
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")
    active = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    chosen = {getattr(processor, "_attention_backend", None) or active for processor in _processors(model)}
    others = sorted({getattr(item, "value", str(item)) for item in chosen} - {_NATIVE})
    if others:
        raise ValueError(
            f"pipeline: {name} computes its attention with diffusers' backend {', '.join(map(repr, others))}, which "
            f"does not call PyTorch's function; {name}.set_attention_backend({_NATIVE!r}) first"
        )


def _processors(model: torch.nn.Module) -> list[Any]:
    found = [getattr(module, "processor", None) for module in model.modules()]
    return [processor for processor in found if processor is not None]
