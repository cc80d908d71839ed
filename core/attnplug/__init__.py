"""A plugin registry for attention kernels on PyTorch: install a kernel package and select it.

Importing attnplug imports nothing else: no torch, no plugin, no kernel. What needs torch is imported
when it is first used, plugins when the registry is first used, and a kernel when it is first chosen.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from attnplug._control.registration import list_flash_attention_impls, list_impls, register_impl, unregister_impl
from attnplug._errors import (
    AttnplugError,
    ChoicesError,
    ChoicesWarning,
    ConfigError,
    DuplicateImplementationError,
    FallbackWarning,
    GradientError,
    KernelError,
    MismatchError,
    MismatchWarning,
    NoImplementationError,
    PluginError,
    PluginWarning,
    ScopeError,
    SpecError,
    UnknownImplementationError,
)
from attnplug._registry.hooks import hookimpl
from attnplug._registry.kernel import Kernel
from attnplug._selection.choices import Choices
from attnplug._selection.watching import RecordedCall
from attnplug._types import (
    Capabilities,
    CausalVariant,
    Feature,
    ImplRecord,
    ImplSpec,
    SDPAParams,
    SDPBackend,
    Verdict,
)
from attnplug._version import __version__

if TYPE_CHECKING:
    from attnplug._api.dense import scaled_dot_product_attention
    from attnplug._api.varlen import varlen_attn
    from attnplug._call.device import bind_cuda_context, compute_capability
    from attnplug._control.activation import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        register_flash_attention_impl,
        restore_flash_attention_impl,
    )
    from attnplug._control.binding import BindingHandle, bind
    from attnplug._control.checkpoints import checkpoint_contexts
    from attnplug._control.choices import restore_choices, use_choices
    from attnplug._control.explain import Explanation, can_use_impl, explain
    from attnplug._control.patch import PatchHandle, patch_torch
    from attnplug._control.scopes import sdpa_kernel
    from attnplug._dispatch.recording import record
    from attnplug._watch.summaries import Ran, Share, summary
    from attnplug._watch.telemetry import Instrumentation, instrument
    from attnplug._watch.verification import Mismatch, verify
    from attnplug.tuning._capture import capture
    from attnplug.tuning._tune import tune

WARN_FOR_UNFUSED_KERNELS = False
"""Set to True to be warned, with each reason, whenever a call falls back to the MATH family."""

_NEEDS_TORCH = {
    "activate_flash_attention_impl": "attnplug._control.activation",
    "current_flash_attention_impl": "attnplug._control.activation",
    "register_flash_attention_impl": "attnplug._control.activation",
    "restore_flash_attention_impl": "attnplug._control.activation",
    "scaled_dot_product_attention": "attnplug._api.dense",
    "varlen_attn": "attnplug._api.varlen",
    "bind_cuda_context": "attnplug._call.device",
    "compute_capability": "attnplug._call.device",
    "Explanation": "attnplug._control.explain",
    "can_use_impl": "attnplug._control.explain",
    "explain": "attnplug._control.explain",
    "Instrumentation": "attnplug._watch.telemetry",
    "Mismatch": "attnplug._watch.verification",
    "Ran": "attnplug._watch.summaries",
    "Share": "attnplug._watch.summaries",
    "instrument": "attnplug._watch.telemetry",
    "summary": "attnplug._watch.summaries",
    "verify": "attnplug._watch.verification",
    "BindingHandle": "attnplug._control.binding",
    "PatchHandle": "attnplug._control.patch",
    "bind": "attnplug._control.binding",
    "capture": "attnplug.tuning._capture",
    "checkpoint_contexts": "attnplug._control.checkpoints",
    "patch_torch": "attnplug._control.patch",
    "record": "attnplug._dispatch.recording",
    "restore_choices": "attnplug._control.choices",
    "sdpa_kernel": "attnplug._control.scopes",
    "tune": "attnplug.tuning._tune",
    "use_choices": "attnplug._control.choices",
}

__all__ = [
    "WARN_FOR_UNFUSED_KERNELS",
    "AttnplugError",
    "BindingHandle",
    "Capabilities",
    "CausalVariant",
    "Choices",
    "ChoicesError",
    "ChoicesWarning",
    "ConfigError",
    "DuplicateImplementationError",
    "Explanation",
    "FallbackWarning",
    "Feature",
    "GradientError",
    "ImplRecord",
    "ImplSpec",
    "Instrumentation",
    "Kernel",
    "KernelError",
    "Mismatch",
    "MismatchError",
    "MismatchWarning",
    "NoImplementationError",
    "PatchHandle",
    "PluginError",
    "PluginWarning",
    "Ran",
    "RecordedCall",
    "SDPAParams",
    "SDPBackend",
    "ScopeError",
    "Share",
    "SpecError",
    "UnknownImplementationError",
    "Verdict",
    "__version__",
    "activate_flash_attention_impl",
    "bind",
    "bind_cuda_context",
    "can_use_impl",
    "capture",
    "checkpoint_contexts",
    "compute_capability",
    "current_flash_attention_impl",
    "explain",
    "hookimpl",
    "instrument",
    "list_flash_attention_impls",
    "list_impls",
    "parallel",
    "patch_torch",
    "record",
    "register_flash_attention_impl",
    "register_impl",
    "restore_choices",
    "restore_flash_attention_impl",
    "scaled_dot_product_attention",
    "sdpa_kernel",
    "summary",
    "tune",
    "unregister_impl",
    "use_choices",
    "varlen_attn",
    "verify",
]


def __getattr__(name: str) -> Any:
    module = _NEEDS_TORCH.get(name)
    if name == "parallel":  # torch.distributed is imported where it is needed
        return importlib.import_module("attnplug.parallel")
    if module is None:
        # With these two Python suggests the name that was probably meant.
        raise AttributeError(f"module 'attnplug' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    importlib.import_module("attnplug._control.torch_registry")
    importlib.import_module("attnplug._watch")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    imported = (name for name in globals() if f"{__name__}.{name}" in sys.modules and not name.startswith("_"))
    return sorted({*__all__, *imported})
