"""The attention call over packed sequences that several ranks share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from attnplug._call.autocast import autocasted
from attnplug._call.prepare import plain_scalars
from attnplug._call.validate import (
    can_look,
    check_extras,
    check_head_sizes,
    check_heads,
    check_int32,
    check_scalars,
    check_tensors,
    is_sharded,
)
from attnplug._run.contract import Result
from attnplug._run.sharded import run_sharded
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams
from attnplug.parallel._entries import run_ring
from attnplug.parallel._exchange import as_group

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from attnplug.parallel._options import PackedOptions


@overload
def ring_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq: Tensor,
    *,
    group: Any,
    return_lse: Literal[False] = ...,
    **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def ring_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq: Tensor,
    *,
    group: Any,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq: Tensor,
    *,
    group: Any,
    return_lse: bool,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def ring_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq: Tensor,
    *,
    group: Any,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention over packed sequences, self-attention, where ranks hold parts of the tokens.

    The tokens of all sequences together are cut as one sequence is: `shard_sequence(tokens, group=group, dim=0)` for
    a causal call, contiguous parts (`is_causal=False`) for any other. Sequences may lie across ranks in any way.

    Args:
        query: `(T, Hq, E)`, this rank's part of the tokens.
        key: `(T, Hkv, E)`, likewise.
        value: `(T, Hkv, Ev)`, likewise.
        cu_seq: int32 `(B + 1,)`: where each sequence starts among all tokens, from 0, and where the last one ends,
            which is the number of all tokens. The same on each rank; on the CPU, or the call waits for the GPU.
        group: the ranks: a process group, or a device mesh of one dimension.
        is_causal: query `i` of a sequence sees its keys `j <= i`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`.
        window_size: `(left, right)`: query `i` of a sequence sees `i - left <= j <= i + right`; -1 leaves a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, as for `ring_attention`.
        dropout_p: as for `ring_attention`.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must compute the blocks.

    Returns:
        `out (T, Hq, Ev)` of this rank's queries; with `return_lse`, `(out, lse)` with `lse (Hq, T)`.

    Raises:
        TypeError, ValueError, NoImplementationError, ParallelError: as `ring_attention`.
    """
    params = SDPAParams(
        query,
        key,
        value,
        None,
        dropout_p,
        is_causal,
        enable_gqa,
        scale=scale,
        causal_variant=CausalVariant.LOWER_RIGHT,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
        cu_seq_q=cu_seq,
        cu_seq_k=cu_seq,
        max_q=0,
        max_k=0,
    )
    ranks, prepared = as_group(group), _packed(params)

    def run(share: SDPAParams) -> Result:
        return run_ring(share, ranks, impl)

    out, lse = run_sharded(prepared, run) if is_sharded(query) else run(prepared)
    return (out, lse) if return_lse else out


def _packed(params: SDPAParams) -> SDPAParams:
    """Check a call of packed sequences, of which this rank has some tokens, and make its defaults explicit.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    params = autocasted(params)
    check_tensors(params)
    check_scalars(params)
    query, key, value, starts = params.query, params.key, params.value, params.cu_seq_q
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: expected (tokens, heads, head size) with the query's tokens, got {tuple(tensor.shape)} "
                f"and a query {tuple(query.shape)}"
            )
    check_head_sizes(query, key)
    check_heads(query.shape[1], key.shape[1], value.shape[1], params.enable_gqa, broadcast=False)
    check_extras(params, query.shape[1], 1, None)
    check_int32("cu_seq", starts, (None,), getattr(starts, "device", query.device))
    starts = starts.cpu()
    if can_look(starts) and (starts.numel() < 2 or starts[0] != 0 or bool((starts.diff() < 0).any())):
        raise ValueError(f"cu_seq: expected values that start at 0 and never decrease, got {starts.tolist()}")
    return replace(params, **plain_scalars(params), cu_seq_q=starts, cu_seq_k=starts)
