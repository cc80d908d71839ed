"""PyTorch's own function, routed through attnplug, in models that know nothing of it.

The function is replaced where Python code finds it: in `torch.nn.functional`, and in every module that
imported it by name. `torch.compile` guards on those names, so a model compiled before follows, and finds
its old code again when the replacement is gone. With nothing selected the replacement calls PyTorch's
function with the very arguments that came.

`torch.compile` takes `multi_head_attention_forward` for one operation and does not look inside; while
the patch is in place a copy of it, which it knows nothing of, stands there and is traced.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` have a fast path in C++ that computes attention
by itself; while something is selected in a thread, that thread is told that there is none. While any
module is bound, all are told so: `nn.TransformerEncoder` asks before the layers that may be bound.
"""

from __future__ import annotations

import sys
import threading
from itertools import repeat
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention as _original
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from attnplug._api import scaled_dot_product_attention
from attnplug._call.prepare import is_causal_bias
from attnplug._selection.state import process, start, thread

_is_mode_on = torch._C._is_torch_function_mode_enabled
_lock = threading.RLock()
_original_fastpath = torch.backends.mha.get_fastpath_enabled
_original_mha = torch.nn.functional.multi_head_attention_forward
_handles: set[PatchHandle] = set()
_replaced: list[tuple[dict[str, Any], str]] = []
_seen: set[str] = set()


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

    Examples:
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
    _seen.clear()
    _replaced[:] = _places(_original)
    _put(_routed)
    torch.nn.functional.multi_head_attention_forward = _traceable_mha
    torch.backends.mha.get_fastpath_enabled = _fastpath_enabled


def _uninstall() -> None:
    _replaced.extend(_places(_routed))  # in modules that were imported since
    _put(_original)
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
    if _handles:  # a module may keep this function beyond the patch
        if _is_mode_on():  # a mode may look for PyTorch's function under the name that it has now
            arguments = query, key, value, attn_mask, dropout_p, is_causal
            return handle_torch_function(_routed, arguments[:4], *arguments, scale=scale, enable_gqa=enable_gqa)
        # Compiled code has no guard on a module's hooks: where there may be some, it needs that on the registry.
        may_be_bound = process.bindings > 0 and is_compiling()
        if (_selected() or may_be_bound) and not _answers_itself(query, key, value):
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if attn_mask is not None and is_causal_bias(attn_mask):  # its class looks for that name too
            return attn_mask._dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _answers_itself(*tensors: Any) -> bool:
    """Whether a tensor's class has its own answer to PyTorch's function; of nested ones attnplug knows."""
    if not has_torch_function(tensors):
        return False
    default = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    overrides = (tensor for tensor in tensors if not getattr(tensor, "is_nested", False))
    return any(getattr(type(tensor).__torch_function__, "__func__", None) is not default for tensor in overrides)


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
    return _original_fastpath() and not _selected() and process.bindings == 0


def _selected() -> bool:
    """Whether anything but PyTorch's own choice may run in this thread."""
    return not process.plain or thread.state.scope is not None or bool(thread.state.recordings)


def _places(function: Any) -> list[tuple[dict[str, Any], str]]:
    """Find the names of `function` in the modules not yet seen, apart from PyTorch's C++ bindings and attnplug itself.

    Runs in C for all but the few modules that hold it: there are some 100,000 names.
    """
    found = []
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if name in _seen or not names or name.partition(".")[0] == "attnplug" or name.startswith("torch._C"):
            continue
        _seen.add(name)
        if True in map(is_, list(names.values()), repeat(function)):
            found += [(names, attribute) for attribute, value in list(names.items()) if value is function]
    return found


def _put(function: Any) -> None:
    """Give all places this function, but for those that somebody else has given another since."""
    for names, attribute in _replaced:
        value = names.get(attribute)
        if value is _original or value is _routed:
            names[attribute] = function
