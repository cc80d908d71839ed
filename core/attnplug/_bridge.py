"""PyTorch's own function, routed through attnplug, in models that know nothing of it.

The function is replaced where Python code finds it: in `torch.nn.functional`, and in every module that
imported it by name. `torch.compile` guards on those names, so a model compiled before follows, and finds
its old code again when the replacement is gone. With nothing selected the replacement calls PyTorch's
function with the very arguments that came.

`torch.compile` takes `multi_head_attention_forward` for one operation and does not look inside; while
the patch is in place a copy of it, which it knows nothing of, stands there and is traced.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` have a fast path in C++ that computes attention
by itself; while something is selected in a thread, that thread is told that there is none.
"""

from __future__ import annotations

import sys
import threading
from types import FunctionType
from typing import Any

import torch

from attnplug._api import scaled_dot_product_attention
from attnplug._selection import process, start, thread
from attnplug.builtin.torch_sdpa import sdpa as _original

_lock = threading.RLock()
_original_fastpath = torch.backends.mha.get_fastpath_enabled
_original_mha = torch.nn.functional.multi_head_attention_forward
_handles: set[PatchHandle] = set()


class PatchHandle:
    """Undoes one `patch_torch()`; the last one removed takes the routing away. Also a context manager."""

    def remove(self) -> None:
        """Undo the patch; a second call does nothing."""
        with _lock:
            if self in _handles:
                _handles.remove(self)
                if not _handles:
                    _uninstall()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def patch_torch() -> PatchHandle:
    """Route `torch.nn.functional.scaled_dot_product_attention` through attnplug, until the handle is removed.

    Scopes, `bind`, `record` and the environment then apply to unmodified models too.

    Example:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> calls[0].impl
        'aten_math'
    """
    start()
    handle = PatchHandle()
    with _lock:
        if not _handles:
            _install()
        _handles.add(handle)
    return handle


def _install() -> None:
    _replace(_original, _routed)
    torch.nn.functional.multi_head_attention_forward = _traceable_mha
    torch.backends.mha.get_fastpath_enabled = _fastpath_enabled


def _uninstall() -> None:
    _replace(_routed, _original)
    torch.nn.functional.multi_head_attention_forward = _original_mha
    torch.backends.mha.get_fastpath_enabled = _original_fastpath


def _routed(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if _selected() and _handles:  # a module may keep this function beyond the patch
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_routed.__name__ = _routed.__qualname__ = "scaled_dot_product_attention"
_routed.__doc__ = _original.__doc__


_traceable_mha = FunctionType(
    _original_mha.__code__,
    _original_mha.__globals__,
    _original_mha.__name__,
    _original_mha.__defaults__,
    _original_mha.__closure__,
)
_traceable_mha.__kwdefaults__ = _original_mha.__kwdefaults__


def _fastpath_enabled() -> bool:
    return _original_fastpath() and not _selected()


def _selected() -> bool:
    """Whether anything but PyTorch's own choice may run in this thread."""
    return not process.plain or thread.scope is not None or bool(thread.recordings) or process.bindings > 0


def _replace(old: Any, new: Any) -> None:
    """Put `new` wherever a module holds `old`, apart from PyTorch's C++ bindings and attnplug itself."""
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] == "attnplug" or name.startswith("torch._C"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, attribute, new)
