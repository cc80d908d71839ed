"""`flash_attn4`: FlashAttention 4, the package `flash-attn-4`, whose module is `flash_attn.cute`.

Written for 4.0.0b36 and the source of 2026-08 (`flash_attn/cute/interface.py`). Tensors are `(B, S, H, E)`, masks
end at the lower right, an open side of a window is None, `lse` is natural, minus infinity in a row that sees no key
(the sink, with one), and has a gradient.

It loads keys and values by TMA as FlashAttention 3 does (`use_tma_KV` in `flash_fwd_sm90.py` and `flash_fwd_sm100.py`;
pages if one holds a tile), so what an H100 showed of that is taken for true here: what does not exist is 0, and pages
are cut. See `flash_attn3`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, bind_cuda_context, compute_capability
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

GPUS = (9, 10, 11, 12)
SMALL = 128
SMALLEST_TILE = 64
"""The least number of keys in a tile (`_tile_size_fwd_sm90` and `_get_fwd_config` of the interface)."""


class Interface:
    """What is called of `flash_attn.cute.interface`."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: Any = None,
        causal: Any = False,
        window_size: Any = (None, None),
        learnable_sink: Any = None,
        softcap: Any = 0.0,
        return_lse: Any = False,
    ) -> Any: ...

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        seqused_k: Any = None,
        page_table: Any = None,
        softmax_scale: Any = None,
        causal: Any = False,
        window_size: Any = (None, None),
        learnable_sink: Any = None,
        softcap: Any = 0.0,
        return_lse: Any = False,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_bwd(
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        dout: Any,
        lse: Any,
        softmax_scale: Any = None,
        causal: Any = False,
        softcap: Any = 0.0,
        window_size_left: Any = None,
        window_size_right: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        deterministic: Any = False,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        dlse: Any = None,
        learnable_sink: Any = None,
    ) -> Any: ...


class FlashAttn4(Adapter):
    """The kernel, on a module that has the functions of `Interface`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    def supports(self, params: SDPAParams) -> list[str]:
        """Return what the GPU, or the combination of head size and arguments, rules out."""
        gpu = compute_capability(params.query.device)
        major = 0 if gpu is None else gpu[0]
        reasons = []
        if gpu is not None and major not in GPUS:
            reasons.append(f"needs compute capability 9.x to 12.x, found {gpu[0]}.{gpu[1]}")
        sizes = (params.query.shape[-1], params.value.shape[-1])
        large = max(convert.rounded_up(size, 8) for size in sizes) > SMALL
        special = major in (10, 11) and sizes in ((192, 128), (256, 256))
        if major >= 10 and large and not special:
            reasons.append(f"has no kernel for head sizes {sizes[0]} and {sizes[1]} on compute capability {major}.x")
        if special and sizes == (256, 256):
            asked = {
                "softcap": params.softcap > 0,
                "sinks": params.sinks is not None,
                "seqused_k": params.seqused_k is not None,
                "block_table": params.block_table is not None,
                "return_lse, differentiated": params.return_lse and params.needs_grad,
            }
            reasons += [f"takes no {name} with head size 256 on {major}.x" for name, wanted in asked.items() if wanted]
        if params.block_table is not None and major == 12:
            reasons.append("has no paged keys on compute capability 12.x")
        return reasons + (self._backward_reasons(params, major) if params.needs_grad else [])

    def _backward_reasons(self, params: SDPAParams, major: int) -> list[str]:
        reasons = []
        if params.block_table is not None:
            reasons.append("has no backward with block_table")
        if major == 12:
            if params.sinks is not None:
                reasons.append("has no backward with sinks on compute capability 12.x")
            if params.softcap > 0:
                reasons.append("has no backward with softcap on compute capability 12.x")
            if torch.are_deterministic_algorithms_enabled():
                reasons.append("has no deterministic backward on compute capability 12.x")
        return reasons

    def notes(self, params: SDPAParams) -> list[str]:
        """Return what is done beside the kernel, and costs."""
        return convert.notes_of_existing(params, SMALLEST_TILE)

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return `out` and `lse`."""
        params, _ = convert.numbers_together(params).with_positive_scale()
        params = convert.pages_in_pieces(params, SMALLEST_TILE)
        tensors = (params.query, params.key, convert.existing(params, params.value))
        multiple = 8 if params.block_table is None else 16  # which reading key by key asserts
        query, key, value = (convert.as_kernel_reads(params, tensor, multiple) for tensor in tensors)
        left, right = _open_as_none(convert.band(params))
        options = {
            "softmax_scale": params.scale,
            "causal": params.is_causal,
            "window_size": (left, right),
            "learnable_sink": convert.together(params.sinks),
            "softcap": params.softcap,
            "return_lse": True,
        }
        bind_cuda_context()
        if params.is_varlen or params.seqused_k is not None:
            paged = params.block_table is not None
            out, lse = self.library.flash_attn_varlen_func(
                query,
                key,
                value,
                cu_seqlens_q=params.cu_seq_q,
                cu_seqlens_k=None if paged else params.cu_seq_k,
                max_seqlen_q=params.max_q,
                max_seqlen_k=params.max_k,
                seqused_k=convert.used_keys(params) if paged else params.seqused_k,
                page_table=params.block_table,
                **options,
            )
        else:
            out, lse = self.library.flash_attn_func(query, key, value, **options)
        out = convert.as_caller_reads(params, out, params.value.shape[-1])
        return convert.outside_cleared(params, out, lse) if params.is_varlen else (out, lse)

    def backward(
        self, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value and sinks."""
        params, sign = convert.numbers_together(params).with_positive_scale()
        grad_out, query = convert.of_sequences(params, grad_out), convert.of_sequences(params, params.query)
        existing = (convert.existing(params, each) for each in (params.key, params.value))
        tensors = (query, *existing, out, grad_out)
        given = [convert.as_kernel_reads(params, tensor) for tensor in tensors]
        grads: list[Tensor | None] = [None, None, None]
        if params.is_varlen or params.seqused_k is not None:  # what is of no sequence, or not used, is not written
            grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in given[:3]]
        dlse = None if grad_lse is None else grad_lse.masked_fill(lse == convert.MINUS_INFINITY, 0.0)
        if params.sinks is not None:  # a row without a denominator would make exp(sink - lse) * 0 a NaN
            lse = lse.masked_fill(lse == convert.MINUS_INFINITY, -convert.MINUS_INFINITY)
        left, right = _open_as_none(convert.band(params))
        bind_cuda_context()
        found = self.library._flash_attn_bwd(
            *given,
            lse.contiguous(),
            softmax_scale=params.scale,
            causal=params.is_causal,
            softcap=params.softcap,
            window_size_left=left,
            window_size_right=right,
            cu_seqlens_q=params.cu_seq_q,
            cu_seqlens_k=params.cu_seq_k,
            seqused_k=params.seqused_k,
            max_seqlen_q=params.max_q,
            max_seqlen_k=params.max_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            dlse=dlse,
            learnable_sink=convert.together(params.sinks),
        )
        sizes = (tensor.shape[-1] for tensor in (params.query, params.key, params.value))
        query, key, value = (
            convert.as_caller_reads(params, grad, size) for grad, size in zip(found[:3], sizes, strict=True)
        )
        sinks = None if params.sinks is None else found[3].to(params.sinks.dtype)
        return query if sign == 1 else query * sign, key, value, None, sinks

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return empty tensors like those of forward."""
        return convert.empty_results(params)


def _open_as_none(band: tuple[int, int]) -> tuple[int | None, int | None]:
    """Return a band whose open sides are None; the library would count -1 as a key."""
    left, right = (None if side < 0 else side for side in band)
    return left, right


kernel = FlashAttn4("flash_attn.cute.interface")
