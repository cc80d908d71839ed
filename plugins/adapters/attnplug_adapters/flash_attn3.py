"""`flash_attn3`: FlashAttention 3, built from source (`flash_attn_interface`) or the wheel `fa3-fwd`.

Written for the source of 2026-08 and the wheel 0.0.3. Sources: `hopper/flash_attn_interface.py`,
`hopper/flash_api.cpp`, `hopper/flash_bwd_preprocess_kernel.h`. A build may leave parts out; its configuration
module says which. Tensors are `(B, S, H, E)`, masks end at the lower right, `lse` is natural, and minus infinity
in a row that sees no key.

The last tile of a sequence is read whole (by TMA, whose box ends with the tensor: `load_V` of
`hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp`, and the loads of `mainloop_bwd_sm90_tma_gmma_ws.hpp`): logits past its end
are replaced, but values there are multiplied by 0, and a NaN is felt. An H100 showed it (0.0.3: every element of out).
So values that do not exist are 0 here, and for backward all that it reads; pages are cut, which takes the way of
`hopper/paged_kv.h`, key by key. That a NaN, or an infinity, in values of one packed sequence may reach rows of the one
before it stays the library's.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, bind_cuda_context, compute_capability
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

HEAD_SIZES = (64, 96, 128, 192, 256)
SMALLEST_TILE = 64
"""The least number of keys in a tile of the kernels for Hopper (`hopper/tile_size.h`)."""


class Interface:
    """What is called of the library."""

    @staticmethod
    def _flash_attn_forward(
        q: Any,
        k: Any,
        v: Any,
        k_new: Any = None,
        v_new: Any = None,
        qv: Any = None,
        out_: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        cu_seqlens_k_new: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        page_table: Any = None,
        softmax_scale: Any = None,
        causal: Any = False,
        window_size_left: Any = -1,
        window_size_right: Any = -1,
        attention_chunk: Any = 0,
        softcap: Any = 0.0,
        num_splits: Any = 1,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        sequed_q: Any = None,
        sequed_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        softmax_scale: Any = None,
        is_causal: Any = False,
        window_size_left: Any = -1,
        window_size_right: Any = -1,
        softcap: Any = 0.0,
        deterministic: Any = False,
    ) -> Any: ...


class FlashAttn3(Adapter):
    """The kernel, on a module that has the functions of `Interface`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    @cached_property
    def left_out(self) -> frozenset[str]:
        """What this build was made without, such as `LOCAL` or `BACKWARD`; nothing if it does not say."""
        try:
            flags = importlib.import_module(f"{self.name.removesuffix('_interface')}_config").CONFIG["build_flags"]
        except ModuleNotFoundError:
            return frozenset()
        return frozenset(name.partition("_DISABLE_")[2] for name, value in flags.items() if value) - {""}

    def supports(self, params: SDPAParams) -> list[str]:
        """Return what the GPU, this build, or the combination of arguments rules out."""
        gpu = compute_capability(params.query.device)
        reasons = [f"this build has no {what}" for part, what in self._asked(params).items() if part in self.left_out]
        if gpu is not None and gpu[0] != 9:
            reasons.append(f"needs compute capability 9.x, found {gpu[0]}.{gpu[1]}")
        size, value_size = params.query.shape[-1], params.value.shape[-1]
        largest = max((size for size in HEAD_SIZES if f"HDIM{size}" not in self.left_out), default=0)
        if size > largest:
            reasons.append(f"this build has no head size above {largest}, got {size}")
        if size != value_size:
            if not (128 < size <= 192 and 96 < value_size <= 128) and not (size <= 64 and value_size <= 512):
                reasons.append(f"has no kernel for the head sizes {size} and {value_size} together")
            if params.needs_grad:
                reasons.append("has no backward for a value head size other than the query's")
        if params.needs_grad and params.block_table is not None:
            reasons.append("has no backward with block_table")
        if params.needs_grad and size > 192 and torch.are_deterministic_algorithms_enabled():
            reasons.append(f"has no deterministic backward for head size {size}")
        return reasons

    def _asked(self, params: SDPAParams) -> dict[str, str]:
        """Return the parts of a build that the call needs."""
        left, right = convert.band(params)
        size = params.query.shape[-1]
        asked = {
            "FP16": (params.query.dtype == torch.float16, "float16"),
            "LOCAL": (left >= 0 or right > 0, "window_size"),
            "SOFTCAP": (params.softcap > 0, "softcap"),
            "VARLEN": (params.is_varlen or params.seqused_k is not None, "sequences of different lengths"),
            "PAGEDKV": (params.block_table is not None, "paged keys"),
            "BACKWARD": (params.needs_grad, "backward"),
            f"HDIMDIFF{64 if size <= 64 else 192}": (
                size != params.value.shape[-1],
                "kernel for another head size of values",
            ),
        }
        return {part: what for part, (wanted, what) in asked.items() if wanted}

    def notes(self, params: SDPAParams) -> list[str]:
        """Return what is done beside the kernel, and costs."""
        return convert.notes_of_existing(params, SMALLEST_TILE)

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return `out` and `lse`."""
        params, _ = convert.numbers_together(params).with_positive_scale()
        params = convert.pages_in_pieces(params, SMALLEST_TILE)
        tensors = (params.query, params.key, convert.existing(params, params.value))
        query, key, value = (convert.as_kernel_reads(params, tensor) for tensor in tensors)
        paged = params.block_table is not None
        bind_cuda_context()
        out, lse, *_ = self.library._flash_attn_forward(
            query,
            key,
            value,
            cu_seqlens_q=params.cu_seq_q,
            cu_seqlens_k=None if paged else params.cu_seq_k,
            seqused_k=convert.used_keys(params) if paged else params.seqused_k,
            max_seqlen_q=params.max_q,
            max_seqlen_k=params.max_k,
            page_table=params.block_table,
            **self._options(params),
            causal=params.is_causal,
        )
        out = convert.as_caller_reads(params, out, params.value.shape[-1])
        if params.is_varlen:
            out, lse = convert.outside_cleared(params, out, lse)
        return convert.with_sinks(params, out, lse)

    def backward(
        self, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value and sinks; the kernel has none through lse."""
        params, sign = convert.numbers_together(params).with_positive_scale()
        grad_out, query = convert.of_sequences(params, grad_out), convert.of_sequences(params, params.query)
        tensors = (grad_out, query, *(convert.existing(params, each) for each in (params.key, params.value)), out)
        given = [convert.as_kernel_reads(params, tensor) for tensor in tensors]
        grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in given[1:4]]
        bind_cuda_context()
        self.library._flash_attn_backward(
            *given,
            lse.contiguous(),
            cu_seqlens_q=params.cu_seq_q,
            cu_seqlens_k=params.cu_seq_k,
            sequed_k=params.seqused_k,
            max_seqlen_q=params.max_q,
            max_seqlen_k=params.max_k,
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            **self._options(params),
            is_causal=params.is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        size = params.query.shape[-1]
        grad_query, *others = (convert.as_caller_reads(params, grad, size) for grad in grads)
        sinks = convert.gradients_of_sinks(params, grad_out, out, lse)
        return grad_query if sign == 1 else grad_query * sign, *others, *sinks

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return empty tensors like those of forward."""
        return convert.empty_results(params)

    def _options(self, params: SDPAParams) -> dict[str, Any]:
        left, right = convert.band(params)
        return {
            "softmax_scale": params.scale,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": params.softcap,
        }


source = FlashAttn3("flash_attn_interface")
wheel = FlashAttn3("fa3_fwd_interface")
