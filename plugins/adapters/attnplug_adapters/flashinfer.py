"""`flashinfer`: FlashInfer's prefill kernels, for inference.

Written for 0.3.1 to 0.7.4 (`flashinfer/prefill.py`, `include/flashinfer/attention/prefill.cuh`). Sequences are
`(T, H, E)` without a batch dimension, masks end at the lower right, `lse` is `(T, H)` and to the base of 2, and a row
that sees no key has neither a 0 nor an infinity of its own. Where sequences start is planned on the host, so a call
with packed sequences or pages waits for the GPU.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, bind_cuda_context
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

WORKSPACE = 128 * 2**20
"""Bytes that the library recommends."""


class Interface:
    """What is called of `flashinfer`."""

    @staticmethod
    def single_prefill_with_kv_cache(
        q: Any,
        k: Any,
        v: Any,
        causal: Any = False,
        kv_layout: Any = "NHD",
        sm_scale: Any = None,
        window_left: Any = -1,
        logits_soft_cap: Any = None,
        return_lse: Any = False,
    ) -> Any: ...

    class BatchPrefillWithRaggedKVCacheWrapper:
        """Packed sequences."""

        def __init__(self, float_workspace_buffer: Any, kv_layout: Any = "NHD") -> None: ...

        def plan(
            self,
            qo_indptr: Any,
            kv_indptr: Any,
            num_qo_heads: Any,
            num_kv_heads: Any,
            head_dim_qk: Any,
            causal: Any = False,
            window_left: Any = -1,
            logits_soft_cap: Any = None,
            sm_scale: Any = None,
            q_data_type: Any = "float16",
        ) -> None: ...

        def run(self, q: Any, k: Any, v: Any, *args: Any, return_lse: Any = False) -> Any: ...

    class BatchPrefillWithPagedKVCacheWrapper:
        """Pages."""

        def __init__(self, float_workspace_buffer: Any, kv_layout: Any = "NHD") -> None: ...

        def plan(
            self,
            qo_indptr: Any,
            paged_kv_indptr: Any,
            paged_kv_indices: Any,
            paged_kv_last_page_len: Any,
            num_qo_heads: Any,
            num_kv_heads: Any,
            head_dim_qk: Any,
            page_size: Any,
            causal: Any = False,
            sm_scale: Any = None,
            window_left: Any = -1,
            logits_soft_cap: Any = None,
            q_data_type: Any = "float16",
        ) -> None: ...

        def run(self, q: Any, paged_kv_cache: Any, *args: Any, return_lse: Any = False) -> Any: ...


class FlashInfer(Adapter):
    """The kernel, on a module that has the functions and classes of `Interface`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    def __init__(self, library: Any) -> None:
        super().__init__(library)
        self._thread = threading.local()

    def supports(self, params: SDPAParams) -> str | None:
        """Decline windows that reach beyond the diagonal."""
        if convert.band(params)[1] > 0:
            return f"has windows only to the left of the diagonal, got window_size={params.window_size}"
        return None

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return `out` and `lse`."""
        params, _ = params.with_positive_scale()
        left, right = convert.band(params)
        options = {
            "causal": right == 0,
            "sm_scale": params.scale,
            "window_left": left,
            "logits_soft_cap": params.softcap or None,
        }
        if params.is_varlen:
            out, lse = self._packed(params, options)
            out, lse = out, convert.natural(lse).T.contiguous()
        elif params.query.shape[0] == 1 and params.seqused_k is None:
            given = (tensor[0].transpose(0, 1).contiguous() for tensor in (params.query, params.key, params.value))
            bind_cuda_context()
            out, lse = self.library.single_prefill_with_kv_cache(*given, **options, return_lse=True)
            out, lse = out.transpose(0, 1).unsqueeze(0), convert.natural(lse).T.contiguous().unsqueeze(0)
        else:
            batch = params.query.shape[0]
            out, lse = self._packed(convert.as_tokens(params), options)
            lse = convert.lse_from_tokens(convert.natural(lse).T, batch)
            out = convert.from_tokens(out, batch)
        return convert.with_sinks(params, *convert.cleared(params, out, lse))

    def _packed(self, params: SDPAParams, options: dict[str, Any]) -> Any:
        """Plan and run sequences; returns out `(T, Hq, Ev)` and lse `(T, Hq)` to the base of 2."""
        starts = params.cu_seq_q.cpu()
        options |= {"q_data_type": params.query.dtype}
        query, key, value = (tensor.contiguous() for tensor in (params.query, params.key, params.value))
        heads, size = query.shape[1:]
        used = convert.used_keys(params).cpu()
        if params.block_table is not None:
            wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self._workspace(query.device), "NHD")
            pages = _Pages(used, params.block_table, key.shape[1])
            wrapper.plan(
                starts, pages.starts, pages.indices, pages.last, heads, key.shape[2], size, key.shape[1], **options
            )
            return self._run(wrapper, query, starts, (key, value))
        if params.seqused_k is not None:  # keys that are not used lie between those that are
            kept = convert.tokens_of(params.cu_seq_k, key.shape[0])
            position = (kept[1] < convert.used_keys(params)[kept[0]]) & ~kept[2]
            key, value = key[position], value[position]
        wrapper = self.library.BatchPrefillWithRaggedKVCacheWrapper(self._workspace(query.device), "NHD")
        wrapper.plan(starts, _starts(used), heads, key.shape[1], size, **options)
        return self._run(wrapper, query, starts, key, value)

    @staticmethod
    def _run(wrapper: Any, query: Tensor, starts: Tensor, *keys: Any) -> tuple[Tensor, Tensor]:
        """Run the queries that belong to sequences; those behind them get zeros, and are cleared by the caller."""
        tokens = int(starts[-1])
        out, lse = wrapper.run(query[:tokens], *keys, return_lse=True)
        missing = query.shape[0] - tokens
        if missing:
            out = torch.cat([out, out.new_zeros(missing, *out.shape[1:])])
            lse = torch.cat([lse, lse.new_zeros(missing, lse.shape[1])])
        return out, lse

    def _workspace(self, device: torch.device) -> Tensor:
        """Return memory for the library, one piece for each thread and stream, so that calls do not share it."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        kept: dict[Any, Tensor] = self._thread.__dict__.setdefault("workspaces", {})
        if (device, stream) not in kept:
            kept[device, stream] = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        return kept[device, stream]

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return empty tensors like those of forward."""
        query, size = params.query, params.value.shape[-1]
        lse = query.new_empty(params.lse_shape, dtype=torch.float32)
        if params.is_varlen:
            return query.new_empty(*query.shape[:-1], size), lse
        batch, heads, queries, _ = query.shape
        return convert.heads_behind(query.new_empty(batch, queries, heads, size)), lse


class _Pages:
    """A block table as the library wants it: the pages of all sequences in a row, and how full the last ones are."""

    def __init__(self, used: Tensor, table: Tensor, page_size: int) -> None:
        count = (used + page_size - 1) // page_size
        self.starts = _starts(count)
        rows = [row[:pages] for row, pages in zip(table, count.tolist(), strict=True)]
        self.indices = torch.cat(rows).int()
        self.last = torch.where(used > 0, (used - 1) % page_size + 1, 0).int()


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


kernel = FlashInfer("flashinfer")
