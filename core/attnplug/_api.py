"""The two attention calls. The first comparisons decide whether PyTorch's own function can simply run."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention as _torch_sdpa  # under the name that patch_torch leaves alone
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function

from attnplug._call.autocast import any_autocast, autocast_dtype, cast
from attnplug._call.facts import UPPER_LEFT, dense_sizes, facts_of, fit_in_three
from attnplug._call.prepare import prepare_dense
from attnplug._dispatch import eager, traced
from attnplug._dispatch.plans import Plan, is_deterministic, plans
from attnplug._dispatch.quick import PASS, PASS_IF_ALIGNED, answer, holds
from attnplug._dispatch.ranges import is_profiled
from attnplug._selection.state import process, start_outside, thread
from attnplug._selection.watching import wished
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalVariant as TorchVariant

_PLAIN = (Tensor, torch.nn.Parameter)


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: bool,
    impl: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_variant: CausalVariant | TorchVariant = UPPER_LEFT,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention with the implementation that the current selection chooses for this call.

    The first eight parameters are those of `torch.nn.functional.scaled_dot_product_attention`, in its
    order. `off`, below, is 0 for `UPPER_LEFT` and `Sk - Sq` for `LOWER_RIGHT`.

    Args:
        query: `(..., Hq, Sq, E)`, float16, bfloat16, float32 or float64.
        key: `(..., Hkv, Sk, E)`, of the query's dtype and device.
        value: `(..., Hkv, Sk, Ev)`, likewise.
        attn_mask: broadcasts to `(..., Hq, Sq, Sk)`; boolean, True takes part; or floating, of the
            query's dtype or float32, added to the logits. A `CausalBias` is accepted. May be combined
            with `is_causal`.
        dropout_p: probability with which a probability is zeroed; the others are scaled by
            `1 / (1 - dropout_p)`.
        is_causal: query `i` sees keys `j <= i + off`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`; query head `h` reads head `h // (Hq / Hkv)`.
        causal_variant: alignment of causal masks, windows and ALiBi distances.
        window_size: `(left, right)`: query `i` sees `i + off - left <= j <= i + off + right`; -1 leaves
            a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, one more logit in each row's denominator, with no value.
        alibi_slopes: `(Hq,)` or `(B, Hq)`; `slope * |i + off - j|` is subtracted from the logits.
        seqused_k: `(B,)` int32; only so many keys of each sequence exist.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must run; stronger than any scope or activation.

    Returns:
        `out (..., Hq, Sq, Ev)` in the query's dtype; with `return_lse`, `(out, lse)` with
        `lse (..., Hq, Sq)` in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NoImplementationError: nothing that is allowed supports the call; the message gives all reasons.
        UnknownImplementationError: `impl` names no implementation.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(2, 8, 16, 64)
        >>> attnplug.scaled_dot_product_attention(query, query, query, is_causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    # Each comparison below is a share of a tiny call's time. PyTorch's keyword arguments cost 0.8 us, so they are
    # left out where they say nothing.
    state = thread.state
    if not process.plain and is_compiling():
        start_outside()
    plain = (
        sinks is None
        and alibi_slopes is None
        and seqused_k is None
        and softcap == 0.0
        and (window_size is OPEN_WINDOW or _is_open(window_size))
        and causal_variant is UPPER_LEFT
    )
    # While measured choices are in use, one look-up says whether PyTorch's function or which kernel takes such a call.
    quick: Any = None
    if process.choices is not None and plain and process.plain and impl is None and state.scope is None:
        unwatched = not (state.watched or is_profiled())
        if attn_mask is None and scale is None and dropout_p == 0.0 and return_lse is False and unwatched:
            quick = answer(query, key, value, is_causal, enable_gqa)
        if type(quick) is Plan and holds(quick, query, key, value):
            return quick.plain(query, key, value, 0.0, is_causal, None, enable_gqa)[0]  # type: ignore[misc]
    # The passthrough: where `torch` comes first, a call that PyTorch's own function can take goes straight to it. A
    # trace takes the same way: each function that it goes through costs a compiled model guards, at every call.
    if (
        quick is PASS
        or (quick is PASS_IF_ALIGNED and _are_aligned(query, key, value))
        or (
            plain
            and process.plain
            and return_lse is False
            and (state.torch_first if impl is None else impl == "torch")
            and (process.choices is None or impl is not None)
            and not (state.watched or is_profiled())
            and (scale is None or (type(scale) is float and 0.0 < scale < inf))
            and (dropout_p == 0.0 or (type(dropout_p) is float and dropout_p < 1.0))
            and (enable_gqa is False or enable_gqa is True)
            and (dense_sizes(query, key, value, enable_gqa) is not None or fit_in_three(query, key, value))
            and (attn_mask is None or (not is_causal and _is_plain_mask(attn_mask, query)))
            and (query.get_device() < 0 or _are_aligned(query, key, value))
        )
    ):
        try:
            if scale is None and not enable_gqa:
                return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal)
            return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        except (RuntimeError, TypeError, ValueError):
            # Almost surely a mistake in the arguments: say which, or let the error be raised again.
            prepare_dense(SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, scale=scale))
            raise
    compiling, plan, facts = is_compiling(), None, None
    if not compiling:
        if type(query) not in _PLAIN and is_symbolic(query):
            return handle_torch_function(
                scaled_dot_product_attention,
                (query, key, value),
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                causal_variant=causal_variant,
                window_size=window_size,
                softcap=softcap,
                sinks=sinks,
                alibi_slopes=alibi_slopes,
                seqused_k=seqused_k,
                return_lse=return_lse,
                impl=impl,
            )
        watched = state.watched
        if watched:
            impl = wished(impl)
        if any_autocast() and (dtype := autocast_dtype(query)) is not None:
            query, key, value, attn_mask = (
                cast(query, dtype),
                cast(key, dtype),
                cast(value, dtype),
                cast(attn_mask, dtype),
            )
        # The kept route: the facts of this call are those of one before it. Some kernels need no record of the call.
        if plain and (attn_mask is None or type(attn_mask) is Tensor) and (return_lse is False or return_lse is True):
            try:
                mask = attn_mask
                if mask is not None and mask.dim() < 4 == query.dim():
                    mask = eager.with_four_dimensions(mask)
                facts = facts_of(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
                generation = process.registry.generation  # type: ignore[union-attr]
                plan = plans.get((state.scope, impl, process.activation, generation, is_deterministic(), facts))
            except (AttributeError, TypeError):  # not tensors, not hashable, or the first call of all
                plan = None
            attn_mask = attn_mask if plan is None else mask
            if plan is not None and plan.plain is not None and attn_mask is None and not (watched or is_profiled()):
                out, lse = plan.plain(query, key, value, dropout_p, is_causal, scale, enable_gqa)
                return (out, lse) if return_lse else out
    fields: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout": dropout_p,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "scale": scale,
        "return_lse": return_lse,
    }
    if not plain:
        fields |= {
            "causal_variant": causal_variant,
            "window_size": window_size,
            "softcap": softcap,
            "sinks": sinks,
            "alibi_slopes": alibi_slopes,
            "seqused_k": seqused_k,
        }
    if compiling:
        out, lse = traced.dense(SDPAParams(**fields), impl)
    else:
        params = eager.params_of(fields)
        found = eager.kept(plan, facts, params, impl) if plan is not None and facts is not None else None
        out, lse = found or eager.dense(params, impl)
    return (out, lse) if return_lse else out


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: bool,
    impl: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention over sequences of different lengths, packed one after the other.

    Causal masks, windows and ALiBi distances are aligned to the lower right of each sequence: for a sequence of
    `Sq` queries and `Sk` keys, `off`, below, is `Sk - Sq`.

    Args:
        query: `(Tq, Hq, E)`, all queries of all sequences.
        key: `(Tk, Hkv, E)`, or pages `(pages, page_size, Hkv, E)` with `block_table`.
        value: `(Tk, Hkv, Ev)`, or pages likewise.
        cu_seq_q: int32 `(B + 1,)`: sequence `b` has the queries from `cu_seq_q[b]` to `cu_seq_q[b + 1]`.
        cu_seq_k: the same for keys; None if `block_table` and `seqused_k` say where and how many.
        max_q: the longest sequence of queries.
        max_k: the longest sequence of keys.
        is_causal: query `i` of a sequence sees its keys `j <= i + off`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`; query head `h` reads head `h // (Hq / Hkv)`.
        window_size: `(left, right)`: query `i` sees `i + off - left <= j <= i + off + right`; -1 leaves
            a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, one more logit in each row's denominator, with no value.
        alibi_slopes: `(Hq,)` or `(B, Hq)`; `slope * |i + off - j|` is subtracted from the logits.
        seqused_k: int32 `(B,)`; only so many keys of each sequence exist.
        block_table: int32 `(B, blocks)`; the pages that hold each sequence's keys, in order.
        dropout_p: probability with which a probability is zeroed; the others are scaled by
            `1 / (1 - dropout_p)`.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must run; stronger than any scope or activation.

    Returns:
        `out (Tq, Hq, Ev)` in the query's dtype; with `return_lse`, `(out, lse)` with `lse (Hq, Tq)` in
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. Values of `cu_seq_*`,
            `seqused_k` and `block_table` are checked where that needs no synchronisation with a GPU.
        NoImplementationError: nothing that is allowed supports the call.
        UnknownImplementationError: `impl` names no implementation.

    Examples:
        >>> import torch, attnplug
        >>> packed = torch.randn(16, 8, 64)  # sequences of 5, 3 and 8 tokens
        >>> starts = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
        >>> attnplug.varlen_attn(packed, packed, packed, starts, starts, 8, 8, is_causal=True).shape
        torch.Size([16, 8, 64])
    """
    fields: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "dropout": dropout_p,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "scale": scale,
        "causal_variant": CausalVariant.LOWER_RIGHT,
        "window_size": window_size,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "seqused_k": seqused_k,
        "return_lse": return_lse,
        "cu_seq_q": cu_seq_q,
        "cu_seq_k": cu_seq_k,
        "max_q": max_q,
        "max_k": max_k,
        "block_table": block_table,
    }
    compiling = is_compiling()
    if not compiling and thread.state.watched:
        impl = wished(impl)
    out, lse = traced.varlen(SDPAParams(**fields), impl) if compiling else eager.varlen(eager.params_of(fields), impl)
    return (out, lse) if return_lse else out


def _is_plain_mask(mask: Tensor, query: Tensor) -> bool:
    """Whether PyTorch's function takes this mask as it is; it also takes some that it then misreads."""
    return (
        type(mask) in _PLAIN
        and query.get_device() < 0  # CUDA kernels misread what `torch` first converts
        and mask.device == query.device
        and mask.dim() > 1
        and (mask.dtype is torch.bool or mask.dtype is query.dtype or query.dtype is not torch.float64)
    )


def _is_open(window: Any) -> bool:
    """Whether this is `OPEN_WINDOW` in another tuple, as a trace has it; -1.0 is not -1."""
    return type(window) is tuple and window == OPEN_WINDOW and type(window[0]) is int is type(window[1])


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether tensors start where CUDA kernels can load 16 bytes at once: PyTorch's fault at others.

    A trace has no storage to ask; Inductor copies inputs that are not aligned.
    """
    return is_compiling() or all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in tensors)


def is_symbolic(query: Any) -> bool:
    """Whether this is not a tensor but answers like one: a value of `torch.fx.symbolic_trace`."""
    return type(query) not in _PLAIN and not isinstance(query, Tensor) and hasattr(type(query), "__torch_function__")
