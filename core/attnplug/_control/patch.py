"""PyTorch's own function, routed through attnplug, in models that know nothing of it.

The function is replaced where Python code finds it: in `torch.nn.functional`, and in every module that
imported it by name. So is `torch.nn.attention.varlen.varlen_attn`. `torch.compile` guards on those names, so a model
compiled before follows, and finds its old code again when the replacement is gone. With nothing selected the
replacement calls PyTorch's function with the very arguments that came.

`torch.compile` takes `multi_head_attention_forward` for one operation and does not look inside; while
the patch is in place a copy of it, which it knows nothing of, stands there and is traced.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` have a fast path in C++ that computes attention
by itself; while something is selected in a thread, that thread is told that there is none. While any
module is bound, all are told so: `nn.TransformerEncoder` asks before the layers that may be bound.
"""

from __future__ import annotations

import pkgutil
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention as _original
from torch.compiler import is_dynamo_compiling
from torch.jit._builtins import _register_builtin
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from attnplug._api.dense import is_symbolic, scaled_dot_product_attention
from attnplug._api.varlen import varlen_attn
from attnplug._call.prepare import is_causal_bias
from attnplug._control.replacing import AfterImport, Replacement
from attnplug._control.scopes import is_torch_first, run_in
from attnplug._dispatch.traced import or_eagerly
from attnplug._errors import AttnplugError, NoImplementationError
from attnplug._handles import Removable
from attnplug._registry.forks import PATCH, lock
from attnplug._selection.selection import Selection
from attnplug._selection.state import process, start, thread
from attnplug._tracing import constant_in_traces

_is_mode_on = torch._C._is_torch_function_mode_enabled
_lock = lock(PATCH)
_original_fastpath = torch.backends.mha.get_fastpath_enabled
_original_mha = torch.nn.functional.multi_head_attention_forward
_handles: set[_Mark] = set()
"""The mark of each patch in place. Its handle is its holder's alone, and collected if nobody can remove it."""


class _Mark:
    """One patch. Of a class of its own, as a trace of PyTorch 2.11 takes no plain `object`, and guards on numbers."""


class PatchHandle(Removable):
    """Undoes one `patch_torch()`; removing the last one ends the routing. Also a context manager."""

    _mark: _Mark | None = None

    def __init__(self, mark: _Mark) -> None:
        self._mark = mark

    def remove(self) -> None:
        """Undo the patch; a second call does nothing."""
        with _lock:
            try:
                if self._mark is not None:
                    _handles.discard(self._mark)
            finally:  # after an interrupt, too
                if process.is_patched and not _handles:
                    _uninstall()

    def __repr__(self) -> str:
        return f"<PatchHandle: {'in place' if self._mark in _handles else 'removed'}>"

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: a copy is of no patch."""
        return {}


def patch_torch() -> PatchHandle:
    """Route `torch.nn.functional.scaled_dot_product_attention` through attnplug, until the handle is removed.

    `torch.nn.attention.varlen.varlen_attn` is routed too. Scopes, `bind`, `record` and the environment then apply to
    unmodified models too. Inside `torch.nn.attention.sdpa_kernel(...)` only implementations of the families that are
    enabled there run.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> calls[0].impl
        'aten_math'
    """
    start()
    mark = _Mark()
    handle = PatchHandle(mark)
    try:
        with _lock:
            is_first = not _handles
            _handles.add(mark)  # before: a handle that is collected meanwhile must not find that there are none
            if is_first:
                _install()
        return handle
    except BaseException:  # an interrupt leaves no patch that nobody can remove
        handle.remove()
        raise


def _install() -> None:
    process.is_patched = True  # before any of it, and until all of it is gone
    try:
        _register_builtin(_routed, "aten::scaled_dot_product_attention")  # TorchScript calls PyTorch's own, as always
        _sdpa.install()
        _varlen_import.install()
        torch.nn.functional.multi_head_attention_forward = _traceable_mha
        torch.backends.mha.get_fastpath_enabled = _fastpath_enabled
    except BaseException:  # an interrupt, too, must find PyTorch's functions again
        _uninstall()
        raise


def _uninstall() -> None:
    try:
        _put_back()
    except BaseException:  # an interrupt: what is begun is finished all the same
        _put_back()
        raise


def _put_back() -> None:
    _sdpa.uninstall()
    _varlen_import.uninstall()
    if _varlen is not None:
        _varlen.uninstall()
    torch.nn.functional.multi_head_attention_forward = _original_mha
    torch.backends.mha.get_fastpath_enabled = _original_fastpath
    process.is_patched = False


class _Routed:
    """What stands in the place of PyTorch's function. An object, because it is saved and copied as PyTorch's own."""

    __name__ = __qualname__ = "scaled_dot_product_attention"
    __module__ = "torch.nn.functional"
    __doc__ = _original.__doc__

    def __call__(
        self,
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
            # Modes, subclasses, nested tensors and symbols, which a trace does not tell of in one question.
            if is_dynamo_compiling() or has_torch_function_variadic(query, key, value):
                # A mode may look for PyTorch's function under the name that it has now; a graph of `torch.fx` keeps it.
                if _is_mode_on() or is_symbolic(query):
                    arguments = query, key, value, attn_mask, dropout_p, is_causal
                    return handle_torch_function(self, arguments[:4], *arguments, scale=scale, enable_gqa=enable_gqa)
                if _selected() and not _answers_itself(query, key, value):
                    return _selected_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            elif _selected():
                return _selected_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if attn_mask is not None and is_causal_bias(attn_mask):  # its class looks for that name too
                return attn_mask._dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def __reduce__(self) -> Any:
        return pkgutil.resolve_name, ("torch.nn.functional:scaled_dot_product_attention",)


class _ArgumentError(ValueError, RuntimeError):
    """A mistake in the arguments that code which expects PyTorch's RuntimeError catches too."""


def _selected_sdpa(
    query: Any, key: Any, value: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any
) -> Any:
    try:
        if _is_narrowed():
            given = query, key, value, mask, dropout, causal, scale, grouped
            return run_in(or_eagerly(_narrowed), scaled_dot_product_attention, *given)
        return scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale, grouped)
    except ValueError as error:
        if query.shape[-1] == 0 == key.shape[-1]:  # PyTorch has an answer to it
            return _original(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
        raise _ArgumentError(str(error)) from error


_flash, _efficient = torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled
_math, _cudnn = torch._C._get_math_sdp_enabled, torch._C._get_cudnn_sdp_enabled
_overrideable = torch._C._get_overrideable_sdp_enabled


@constant_in_traces
def _is_narrowed() -> bool:
    """Whether `torch.nn.attention.sdpa_kernel` has ruled out a family. 0.2 us."""
    return not (_flash() and _math() and _efficient() and _cudnn() and _overrideable())


def _narrowed() -> tuple[Any, bool]:
    """Return a scope of what both attnplug's selection and `torch.nn.attention.sdpa_kernel` allow."""
    scope, activation = thread.state.scope, process.activation
    if not is_dynamo_compiling():
        return _allowed_here(scope, activation)
    allowed = _allowed_outside(scope, activation)
    if isinstance(allowed, str):
        raise AttnplugError(allowed)  # of which `or_eagerly` needs the text
    return allowed


@constant_in_traces
def _allowed_outside(scope: Any, activation: str | None) -> tuple[Any, bool] | str:
    """Decide outside the graph; return what is wrong, if anything is."""
    try:
        return _allowed_here(scope, activation)
    except AttnplugError as error:  # what leaves this function, Dynamo takes for a fault of its own
        return str(error)


def _allowed_here(scope: Any, activation: str | None) -> tuple[Any, bool]:
    asked = (_math, _flash, _efficient, _cudnn, _overrideable)
    families = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "OVERRIDEABLE")
    enabled = frozenset(family for family, is_enabled in zip(families, asked, strict=True) if is_enabled())
    return _allowed(Selection(None, scope, activation, process.preferred), start().generation, enabled)


@lru_cache(256)
def _allowed(selection: Selection, generation: int, enabled: frozenset[str]) -> tuple[Any, bool]:
    candidates = selection.candidates(start())
    names = tuple(
        entry.name for entry in candidates if entry.spec.backend is None or entry.spec.backend.name in enabled
    )
    if not names:
        shown = ", ".join(sorted(enabled)) or "no family"
        reason = f"is of a family that is not enabled in torch.nn.attention.sdpa_kernel, where {shown} is"
        raise NoImplementationError({entry.name: (reason,) for entry in candidates}, selection.exact)
    scope = (selection.scope is not None and selection.scope[0], names)
    return scope, is_torch_first(scope)


class _RoutedVarlen:
    """What stands in the place of `torch.nn.attention.varlen.varlen_attn`."""

    __name__ = __qualname__ = "varlen_attn"

    def __call__(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, **others: Any
    ) -> Any:
        given = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
        if not _handles or not _selected() or not _VARLEN_ARGUMENTS.issuperset(others):
            assert _varlen is not None
            return _varlen.original(*given, **others)
        aux = others.pop("return_aux", None)
        window = tuple(others.pop("window_size", (-1, -1)))
        causal = window == (-1, 0)  # as PyTorch's function says it
        others |= {"window_size": (-1, -1) if causal else window, "is_causal": causal}
        return varlen_attn(*given, **others, return_lse=aux is not None and bool(aux.lse))

    def __reduce__(self) -> Any:
        return pkgutil.resolve_name, ("torch.nn.attention.varlen:varlen_attn",)


_VARLEN_ARGUMENTS = {"return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "block_table"}
"""The arguments that mean something to attnplug; `num_splits`, which rules how PyTorch's kernel computes, does not."""


def _route_varlen(module: ModuleType) -> None:
    global _varlen
    if _varlen is None:
        _varlen = Replacement(module.varlen_attn, _RoutedVarlen())
    _varlen.install()


_routed = _Routed()
_sdpa = Replacement(_original, _routed)
_varlen: Replacement | None = None
_varlen_import = AfterImport("torch.nn.attention.varlen", _route_varlen)


def _answers_itself(*tensors: Any) -> bool:
    """Whether a tensor's class has its own answer to PyTorch's function; of nested ones attnplug knows."""
    if not has_torch_function(tensors):
        return False
    default = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]  # a classmethod has it
    overrides = (tensor for tensor in tensors if not getattr(tensor, "is_nested", False))
    return any(getattr(type(tensor).__torch_function__, "__func__", None) is not default for tensor in overrides)


_traceable_mha = FunctionType(
    _original_mha.__code__,
    _original_mha.__globals__,
    _original_mha.__name__,
    _original_mha.__defaults__,
    _original_mha.__closure__,
)
_traceable_mha.__kwdefaults__ = _original_mha.__kwdefaults__


def _fastpath_enabled() -> bool:
    # TorchScript reads this function, and beside an ignored type no other comment. `torch.jit` exports the name unsaid.
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _original_fastpath() and not _chosen() and process.bindings == 0
    return True


def _selected() -> bool:
    """Whether anything but PyTorch's own choice may run in this thread; inside a plugin's kernel nothing may."""
    chosen = not process.plain or process.choices is not None  # `_chosen`, without a call of its own
    return (chosen or thread.state.scope is not None or bool(thread.state.watched)) and not thread.in_kernel


def _chosen() -> bool:
    """Whether anything is selected, or watches. Measured choices do not end the fast path, which was not measured."""
    return not process.plain or thread.state.scope is not None or bool(thread.state.watched)
