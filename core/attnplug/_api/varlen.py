"""The call of packed sequences."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, overload

from torch import Tensor, is_grad_enabled
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling, is_dynamo_compiling

from attnplug._api.dense import are_numbers, is_symbolic, to_symbols
from attnplug._call.facts import NUMBERS
from attnplug._call.prepare import prepare_varlen, without_numpy
from attnplug._call.validate import is_sharded
from attnplug._call.validate_varlen import check_lengths
from attnplug._dispatch import eager, traced
from attnplug._dispatch.plans import who_decides
from attnplug._dispatch.recognised import PLAIN, distinct, known, recognise_packed
from attnplug._params import params_of
from attnplug._run.sharded import run_sharded
from attnplug._selection.state import process, thread
from attnplug._selection.watching import wished
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams


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
        alibi_slopes: `(Hq,)` or `(B, Hq)`; `slope * |i + off - j|` is subtracted from the logits. They get no
            gradient, and are an error where one is required.
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
    tracing = is_dynamo_compiling()
    if scale is not None and type(scale) is not float:
        scale = without_numpy(scale, tracing)
    if thread.state.watched and not is_compiling():
        impl = wished(impl)
    way, found = None, None
    if (
        not tracing
        and are_numbers(CausalVariant.LOWER_RIGHT, window_size, softcap, None, None)
        and (process.choices is None or impl is not None)
        and (impl is None or type(impl) is str)
        and (is_causal is False or is_causal is True)
        and (enable_gqa is False or enable_gqa is True)
        and (return_lse is False or return_lse is True)
        and (scale is None or type(scale) is float)
        and type(dropout_p) in NUMBERS
        and type(max_q) is int is type(max_k)
    ):
        given = sinks is None, alibi_slopes is None, seqused_k is None, block_table is None
        starts = cu_seq_k is None, cu_seq_k is cu_seq_q
        numbers = is_causal, enable_gqa, return_lse, scale, dropout_p, window_size, softcap
        way = who_decides(impl), numbers, given, starts, is_grad_enabled()
        candidates = known.get(way)
        if candidates is not None:
            tensors = distinct(query, key, value, sinks, alibi_slopes, seqused_k, cu_seq_q, cu_seq_k, block_table)
            found = recognise_packed(candidates, tensors, max_q, max_k)
            looked_at = query.is_cpu or thread.state.watched or _profiler_enabled()  # lengths on a CPU are, each time
            if found is not None and found.plain is not None and not looked_at:
                out, lse = found.plain(*tensors)
                return (out, lse) if return_lse else out
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
    if found is not None and check_lengths(params := params_of(fields)) > 0:
        out, lse = found.run_as_given(params)
        return (out, lse) if return_lse else out
    if tracing:
        return traced.or_eagerly(_the_long_way, fields, impl, way)
    return _the_long_way(fields, impl, way)


def _the_long_way(fields: dict[str, Any], impl: str | None, way: Hashable) -> Any:
    """Run a call that is not like one before it, or is traced, symbolic or sharded."""
    query, compiling = fields["query"], is_compiling()
    if type(query) not in PLAIN:
        if not compiling and is_symbolic(query):
            del fields["causal_variant"]
            return to_symbols(varlen_attn, fields, impl)
        if is_sharded(query):
            run = traced.varlen if compiling else eager.varlen
            out, lse = run_sharded(prepare_varlen(SDPAParams(**fields)), lambda share: run(share, impl))
            return (out, lse) if fields["return_lse"] else out
    if compiling:
        out, lse = traced.varlen(SDPAParams(**fields), impl)
    else:
        out, lse = eager.varlen(params_of(fields), impl, way)
    return (out, lse) if fields["return_lse"] else out
