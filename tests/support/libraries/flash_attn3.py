"""`flash_attn_interface` of FlashAttention 3 on the CPU: its signatures, and what they are documented to do.

Sources: `hopper/flash_attn_interface.py`, `hopper/flash_api.cpp`. Out has memory of its own, `(B, S, H, Ev)`.

A last tile is read whole, whatever is behind the sequence there, and multiplied by probabilities of 0: seen of the
wheel `fa3-fwd` 0.0.3 on an H100, and so written in `hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp` (`load_V`: by TMA,
whose box knows the tensor's end alone) and `mainloop_bwd_sm90_tma_gmma_ws.hpp`. Pages are read so if a tile fits in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from libraries.formula import INF, NAN, Mask, added_up, backward, check_memory, forward, pages

TILE = 128


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    kv_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    seqlens_rotary: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
):
    check_memory(q, k, v)
    assert cu_seqlens_k is None or page_table is None, "If cu_seqlens_k is passed in, then page table is not supported"
    assert cu_seqlens_q is None or max_seqlen_q is not None
    out = torch.full((*q.shape[:-1], v.shape[-1]), NAN, dtype=q.dtype)
    varlen = cu_seqlens_q is not None
    lse = torch.full((q.shape[-2], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1]), NAN)
    mask = Mask(scale=softmax_scale, causal=causal, left=window_size_left, right=window_size_right, softcap=softcap)
    for b, each in enumerate(sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table)):
        found = forward(each.query, each.key, each.value, mask, -INF)
        if varlen:
            out[each.rows], lse[:, each.rows] = found
        else:
            out[b], lse[b] = found
        out[each.rows if varlen else b] += each.felt(v)
    return out, lse, torch.tensor([]), torch.tensor([])


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    sequed_q: torch.Tensor | None = None,
    sequed_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> torch.Tensor:
    check_memory(dout, q, k, v, out, dq, dk, dv)
    mask = Mask(scale=softmax_scale, causal=is_causal, left=window_size_left, right=window_size_right, softcap=softcap)
    write_gradients(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_k, (dq, dk, dv), mask, deterministic
    )
    return torch.empty(0)


def write_gradients(dout, q, k, v, out, lse, cu_q, cu_k, used, grads, mask, deterministic, grad_lse=None):
    """Write the gradients of each sequence; a row whose lse is minus infinity has none (`lse == -INF ? 0 : lse`)."""
    check_lengths(cu_q, cu_k, used)
    for b, each in enumerate(sequences(q, k, v, cu_q, cu_k, used, None)):
        rows, key = each.rows, each.key
        at = (rows, slice(int(cu_k[b]), int(cu_k[b]) + key.shape[0])) if cu_q is not None else (b, b)
        rows_lse = lse[:, rows] if cu_q is not None else lse[b]
        rows_lse = rows_lse.masked_fill(rows_lse == -INF, 0.0)
        gradient = None if grad_lse is None else grad_lse[:, rows] if cu_q is not None else grad_lse[b]
        found = backward(dout[at[0]], each.query, key, each.value, out[at[0]], rows_lse, mask, gradient)
        of_queries = 0.0 * (behind(q, rows).sum() + behind(dout, rows).sum()) if cu_q is not None else 0.0
        found = added_up(found[0], deterministic) + each.felt(k, v), *(part + of_queries for part in found[1:])
        for grad, part, place in zip(grads, found, (at[0], at[1], at[1]), strict=True):
            if cu_q is not None or place is at[0] is not at[1]:
                grad[place] = part
            else:
                grad[place][: part.shape[0]] = part


def check_lengths(*lengths: torch.Tensor | None) -> None:
    """What both libraries refuse, but for forward of FlashAttention 3, which copies them."""
    assert all(each is None or each.stride(-1) == 1 for each in lengths), "must be contiguous in the last dimension"


class Sequence(NamedTuple):
    """The rows, queries, keys and values of one sequence, and where in their memory its keys begin."""

    rows: slice
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    batch: int | None
    start: int
    table: torch.Tensor | None

    def felt(self, *tensors: torch.Tensor) -> torch.Tensor | float:
        """Return 0 times what is read behind its keys in keys or values: 0, or NaN."""
        keys = self.key.shape[0]
        if keys == 0:
            return 0.0
        found = 0.0
        for tensor in tensors:
            if self.table is None:
                memory = tensor if self.batch is None else tensor[self.batch]
            elif tensor.shape[1] % TILE:
                continue
            else:
                memory = pages(tensor, self.table, -(-keys // TILE) * TILE)
            found = found + 0.0 * behind(memory, slice(self.start, self.start + keys)).sum()
        return found


def behind(memory: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return what the last tile of these rows holds besides them; beyond the tensor nothing is read."""
    return memory[rows.stop : rows.start + -(-(rows.stop - rows.start) // TILE) * TILE].double()


def sequences(q, k, v, cu_q, cu_k, used, table) -> Iterator[Sequence]:
    """Yield each sequence."""
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    rows = [slice(0, q.shape[1])] * batch if cu_q is None else [slice(*pair) for pair in pairwise(cu_q.tolist())]
    columns = [slice(*pair) for pair in pairwise(cu_k.tolist())] if cu_k is not None else None
    for b in range(batch):
        query = q[b] if cu_q is None else q[rows[b]]
        if table is not None:
            key, value = (pages(tensor, table[b], int(used[b])) for tensor in (k, v))
        else:
            key, value = (tensor[b] if columns is None else tensor[columns[b]] for tensor in (k, v))
            if used is not None:
                key, value = key[: int(used[b])], value[: int(used[b])]
        start = 0 if columns is None else columns[b].start
        yield Sequence(
            rows[b],
            query,
            key,
            value,
            batch=b if columns is None else None,
            start=start,
            table=None if table is None else table[b],
        )
