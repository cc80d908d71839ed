"""The attention calls over one sequence, or a batch of equal ones, that several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from attnplug._call.prepare import prepare_dense
from attnplug._call.validate import check_int32, is_sharded
from attnplug._run.contract import Result
from attnplug._run.sharded import run_sharded
from attnplug._types import OPEN_WINDOW, SDPAParams
from attnplug.parallel._entries import run_ring
from attnplug.parallel._exchange import as_group, as_mesh
from attnplug.parallel._methods import ulysses, usp

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from attnplug.parallel._options import HeadsOptions, RingOptions


@overload
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    return_lse: Literal[False] = ...,
    **options: Unpack[RingOptions],
) -> Tensor: ...
@overload
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: Any, return_lse: Literal[True], **options: Unpack[RingOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: Any, return_lse: bool, **options: Unpack[RingOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    length: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention over a sequence of which each rank holds a part, with keys and values passing between ranks.

    The result and its gradients are those of `attnplug.scaled_dot_product_attention` on the whole sequence, cut the
    same way. A causal call expects the parts of `shard_sequence`, any other contiguous ones; positions, and with them
    windows, are those in the whole sequence. Every implementation that gives an lse runs, and computes on each rank
    what it would compute anyway; while it does, the keys and values for the next block are on their way.

    Args:
        query: `(..., Hq, S, E)`, this rank's part of the sequence.
        key: `(..., Hkv, S, E)`, likewise.
        value: `(..., Hkv, S, Ev)`, likewise. Without `is_causal` and windows there may be more or fewer keys than
            queries.
        group: the ranks: a process group, or a device mesh of one dimension.
        is_causal: query `i` sees keys `j <= i`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`; the keys and values that pass are the `Hkv` ones.
        window_size: `(left, right)`: query `i` sees `i - left <= j <= i + right`; -1 leaves a side open. Keys pass no
            further than that.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, one more logit in each row's denominator, the same on each rank. Its gradient on a rank is
            that rank's share, as for any parameter.
        seqused_k: `(B,)` int32; only so many keys of each whole sequence exist.
        dropout_p: as in the call on one rank. Each pair of query and key is drawn for once.
        length: of the whole sequence of keys; needed if it was not cut evenly. None is this rank's part times the
            number of ranks.
        return_lse: also return the natural logarithm of the softmax's denominator, over all keys.
        impl: the implementation that must compute the blocks.

    Returns:
        `out (..., Hq, S, Ev)` of this rank's queries; with `return_lse`, `(out, lse)` with `lse (..., Hq, S)`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NoImplementationError: no implementation that is allowed computes the blocks; raised on each rank, before
            anything is sent.
        ParallelError: another rank failed, or did not answer within the group's timeout; the message names it.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from attnplug import parallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> part = parallel.shard_sequence(torch.randn(1, 4, 8, 16), group=dist.group.WORLD)
        >>> parallel.ring_attention(part, part, part, group=dist.group.WORLD, is_causal=True).shape
        torch.Size([1, 4, 8, 16])
        >>> dist.destroy_process_group()
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
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqused_k=seqused_k,
        return_lse=return_lse,
        max_k=length,
    )
    ranks = as_group(group)
    return _dense(params, lambda prepared: run_ring(prepared, ranks, impl))


@overload
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    return_lse: Literal[False] = ...,
    **options: Unpack[HeadsOptions],
) -> Tensor: ...
@overload
def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: Any, return_lse: Literal[True], **options: Unpack[HeadsOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: Any, return_lse: bool, **options: Unpack[HeadsOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    length: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention over a sequence of which each rank holds a contiguous part, by exchanging sequence for heads.

    Each rank gets all of the sequence for its share of the heads, attends as on one rank, and gives the results back.
    Any implementation runs; the numbers of query and of key/value heads must be multiples of the number of ranks.

    Args:
        query: `(..., Hq, S, E)`, this rank's part of the sequence: part `r` of `n`, also for a causal call.
        key: `(..., Hkv, S, E)`, likewise.
        value: `(..., Hkv, S, Ev)`, likewise.
        group: the ranks: a process group, or a device mesh of one dimension.
        attn_mask: of the whole sequence, the same on each rank; broadcasts to `(..., Hq, Sq, Sk)`. Its gradient, and
            that of sinks, is the share of this rank's heads, as for any parameter.
        is_causal: query `i` sees keys `j <= i`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`.
        window_size: `(left, right)`: query `i` sees `i - left <= j <= i + right`; -1 leaves a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, the same on each rank.
        alibi_slopes: `(Hq,)` or `(B, Hq)`, the same on each rank.
        seqused_k: `(B,)` int32; only so many keys of each whole sequence exist.
        dropout_p: as in the call on one rank; ranks draw differently, whatever they were seeded with.
        length: of the whole sequence of keys; needed if it was not cut evenly.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must run.

    Returns:
        `out (..., Hq, S, Ev)` of this rank's queries; with `return_lse`, `(out, lse)` with `lse (..., Hq, S)`.

    Raises:
        TypeError, ValueError: an argument is wrong, or the ranks cannot share the heads; the message says what would.
        NoImplementationError: nothing that is allowed supports the call.
        ParallelError: another rank failed, or did not answer within the group's timeout; the message names it.
    """
    params = SDPAParams(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        seqused_k=seqused_k,
        return_lse=return_lse,
        max_k=length,
    )
    ranks = as_group(group)
    return _dense(params, lambda prepared: ulysses(prepared, ranks, impl))


@overload
def usp_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: Any,
    return_lse: Literal[False] = ...,
    **options: Unpack[RingOptions],
) -> Tensor: ...
@overload
def usp_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mesh: Any, return_lse: Literal[True], **options: Unpack[RingOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def usp_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mesh: Any, return_lse: bool, **options: Unpack[RingOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def usp_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: Any,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    length: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention by both methods: a ring along the first dimension of a mesh, heads split along the second.

    The sequence is cut for the ring, and each of these parts contiguously: `shard_sequence(..., group=mesh)`. Fang and
    Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", 2024.

    Args:
        query: `(..., Hq, S, E)`, this rank's part of the sequence.
        key: `(..., Hkv, S, E)`, likewise.
        value: `(..., Hkv, S, Ev)`, likewise.
        mesh: a device mesh of two dimensions, `(ring, heads)`. The second is for the faster network.
        is_causal: query `i` sees keys `j <= i`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`.
        window_size: `(left, right)`: query `i` sees `i - left <= j <= i + right`; -1 leaves a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, as for `ring_attention`.
        seqused_k: `(B,)` int32; only so many keys of each whole sequence exist.
        dropout_p: as in the call on one rank; ranks draw differently, whatever they were seeded with.
        length: of the whole sequence; needed if it was not cut evenly.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must compute the blocks.

    Returns:
        As `ring_attention`.

    Raises:
        TypeError, ValueError, NoImplementationError, ParallelError: as `ring_attention` and `ulysses_attention`.
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
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqused_k=seqused_k,
        return_lse=return_lse,
        max_k=length,
    )
    ranks = as_mesh(mesh)
    return _dense(params, lambda prepared: usp(prepared, ranks, impl))


def _dense(params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Any:
    """Check a dense call, bring it into the form that kernels know, run it, and return what the caller asked for.

    A mask and `seqused_k` are those of the whole sequence, whose length this rank's tensors do not have.
    """
    prepared, rows = prepare_dense(replace(params, attn_mask=None, seqused_k=None))
    if params.seqused_k is not None:
        check_int32("seqused_k", params.seqused_k, (prepared.query.shape[0],), prepared.query.device)
    if params.max_k is not None and (type(params.max_k) is not int or params.max_k < 1):
        raise TypeError(f"length: expected the number of positions of the whole sequence, got {params.max_k!r}")
    prepared = replace(prepared, attn_mask=params.attn_mask, seqused_k=params.seqused_k)
    out, lse = run_sharded(prepared, run) if is_sharded(prepared.query) else run(prepared)
    out = out.reshape(*rows, out.shape[-1])
    return (out, lse.reshape(rows)) if params.return_lse and lse is not None else out
