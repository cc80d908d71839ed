"""`flashinfer` 0.7.2 on the CPU: its signatures, and what they are documented to do.

Sources: `flashinfer/prefill.py`, `include/flashinfer/attention/prefill.cuh` (lse is to the base of 2, and its
infinity is the number 5e4), `variants.cuh` (a window has a left side alone).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from libraries.formula import Mask, forward

FAKE_INFINITY = 5e4


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out, lse = _attend(q, k, v, causal, sm_scale, window_left, logits_soft_cap)
    return (out, lse) if return_lse else out


class _Wrapper:
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8

    def _run(self, q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        starts = self.starts.tolist()
        assert q.shape[0] == starts[-1] and q.dtype == self.options["q_data_type"]
        found = [
            _attend(
                q[start:stop],
                key,
                value,
                self.options["causal"],
                self.options["sm_scale"],
                self.options["window_left"],
                self.options["logits_soft_cap"],
            )
            for start, stop, (key, value) in zip(starts, starts[1:], keys, strict=False)
        ]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def _plan(self, starts: torch.Tensor, **options: Any) -> None:
        assert starts.dtype == torch.int32
        self.starts, self.options = starts, options


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        self._plan(
            qo_indptr,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
        )
        self.kv = kv_indptr.tolist()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
    ) -> Any:
        pairs = zip(self.kv, self.kv[1:], strict=False)
        found = self._run(q, [(k[start:stop], v[start:stop]) for start, stop in pairs])
        return found if return_lse else found[0]


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        self._plan(
            qo_indptr,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
        )
        self.pages = paged_kv_indptr.tolist(), paged_kv_indices.tolist(), paged_kv_last_page_len.tolist()

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        sinks: torch.Tensor | None = None,
    ) -> Any:
        starts, indices, last = self.pages
        keys = []
        for start, stop, length in zip(starts, starts[1:], last, strict=False):
            size = paged_kv_cache[0].shape[1]
            count = (stop - start - 1) * size + length if stop > start else 0
            keys.append(tuple(cache[indices[start:stop]].flatten(0, 1)[:count] for cache in paged_kv_cache))
        found = self._run(q, keys)
        return found if return_lse else found[0]


def _attend(q, k, v, causal, scale, left, softcap):
    assert q.shape[-1] in (64, 128, 256) and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    mask = Mask(scale=scale, causal=causal, left=left, softcap=softcap or 0.0)
    out, lse = forward(q, k, v, mask, math.inf)
    blind = lse == math.inf
    lse = (lse / math.log(2)).masked_fill(blind, -FAKE_INFINITY).T.float().contiguous()
    return out.masked_fill(blind.T.unsqueeze(-1), 0.25).to(q.dtype), lse
