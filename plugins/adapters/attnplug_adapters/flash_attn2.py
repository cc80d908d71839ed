"""`flash_attn2`: FlashAttention 2, the package `flash-attn`.

Written for 2.7.3 to 2.8.3.post2. Sources: `flash_attn/flash_attn_interface.py`, `csrc/flash_attn/flash_api.cpp`,
`csrc/flash_attn/src/flash_bwd_launch_template.h`. The functions below its public ones are called, because the
public ones keep what backward needs to themselves. Tensors are `(B, S, H, E)`, masks end at the lower right,
`lse` is natural, and plus infinity in a row that sees no key.

What is past the last key is not felt: the last tile is cleared there (`Clear_OOB_MN` in `flash_fwd_kernel.h` and
`flash_bwd_kernel.h`), which FlashAttention 3 and 4 leave out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, compute_capability
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

PAGE = 256


class Interface:
    """What is called of `flash_attn.flash_attn_interface`."""

    @staticmethod
    def _flash_attn_forward(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: Any,
        softmax_scale: Any,
        causal: Any,
        window_size_left: Any,
        window_size_right: Any,
        softcap: Any,
        alibi_slopes: Any,
        return_softmax: Any,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_varlen_forward(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: Any,
        softmax_scale: Any,
        causal: Any,
        window_size_left: Any = -1,
        window_size_right: Any = -1,
        softcap: Any = 0.0,
        alibi_slopes: Any = None,
        return_softmax: Any = False,
        block_table: Any = None,
        leftpad_k: Any = None,
        seqused_k: Any = None,
        zero_tensors: Any = False,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        dropout_p: Any,
        softmax_scale: Any,
        causal: Any,
        window_size_left: Any,
        window_size_right: Any,
        softcap: Any,
        alibi_slopes: Any,
        deterministic: Any,
        rng_state: Any = None,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_varlen_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: Any,
        softmax_scale: Any,
        causal: Any,
        window_size_left: Any,
        window_size_right: Any,
        softcap: Any,
        alibi_slopes: Any,
        deterministic: Any,
        rng_state: Any = None,
        zero_tensors: Any = False,
    ) -> Any: ...


class FlashAttn2(Adapter):
    """The kernel, on a module that has the functions of `Interface`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    def supports(self, params: SDPAParams) -> list[str]:
        """Return each combination that the kernel refuses, or would compute wrongly."""
        reasons = []
        if params.softcap > 0 and params.dropout > 0:
            reasons.append("takes no softcap together with dropout")
        if params.block_table is not None and params.key.shape[1] % PAGE:
            reasons.append(f"needs pages of a multiple of {PAGE} keys, got {params.key.shape[1]}")
        if not params.needs_grad:
            return reasons
        for name in ("seqused_k", "block_table"):
            if getattr(params, name) is not None:
                reasons.append(f"has no backward with {name}")
        gpu, size = compute_capability(params.query.device), params.query.shape[-1]
        if size > 192 and params.dropout > 0 and gpu is not None and (gpu in ((8, 6), (8, 9)) or gpu[0] == 12):
            reasons.append(f"has no backward for head size {size} with dropout on compute capability {gpu[0]}.{gpu[1]}")
        return reasons

    def forward(self, params: SDPAParams) -> tuple[Tensor, ...]:
        """Return `out`, `lse` and, with dropout, the seed and offset of its random numbers."""
        params, _ = convert.numbers_together(params).with_positive_scale()
        if params.dropout == 1:  # nothing is left, and the kernel refuses to divide by what is
            out, *others = self.forward(replace(params, dropout=0.0))
            return torch.zeros_like(out), *others
        if params.seqused_k is not None and not params.is_varlen:
            batch = params.query.shape[0]
            out, lse, *state = self.forward(convert.as_tokens(params))
            return convert.from_tokens(out, batch), convert.lse_from_tokens(lse, batch), *state
        size = params.value.shape[-1]
        query, key, value = (
            convert.as_kernel_reads(params, tensor) for tensor in (params.query, params.key, params.value)
        )
        if params.is_varlen:
            out, lse, _, state = self._packed(params, query, key, value)
        else:
            out, lse, _, state = self.library._flash_attn_forward(
                query, key, value, **self._options(params), return_softmax=False
            )
        out, lse = convert.as_caller_reads(params, out, size), convert.blind_as_minus_infinity(lse)
        out, lse = convert.with_sinks(params, out, lse)
        return (out, lse, state) if params.dropout > 0 else (out, lse)

    def _packed(self, params: SDPAParams, query: Tensor, key: Tensor, value: Tensor) -> Any:
        starts = params.cu_seq_k
        if starts is None:  # pages and seqused_k say it all, and the kernel wants a tensor
            starts = torch.nn.functional.pad(params.seqused_k.cumsum(0), (1, 0)).int()
        return self.library._flash_attn_varlen_forward(
            query,
            key,
            value,
            cu_seqlens_q=params.cu_seq_q,
            cu_seqlens_k=starts,
            max_seqlen_q=params.max_q,
            max_seqlen_k=params.max_k,
            **self._options(params),
            block_table=params.block_table,
            seqused_k=params.seqused_k,
            zero_tensors=True,  # tokens of no sequence are not written
        )

    def backward(
        self,
        params: SDPAParams,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value and sinks; the kernel has none through lse."""
        params, sign = convert.numbers_together(params).with_positive_scale()
        if params.dropout == 1:
            zeros = (torch.zeros_like(tensor) for tensor in (params.query, params.key, params.value))
            return *zeros, *convert.gradients_of_sinks(params, grad_out, out, lse)
        tensors = (grad_out, params.query, params.key, params.value, out)
        given = [convert.as_kernel_reads(params, tensor) for tensor in tensors]
        grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in given[1:4]]
        options = self._options(params) | {"deterministic": torch.are_deterministic_algorithms_enabled()}
        infinite = convert.blind_as_infinity(lse)
        if params.is_varlen:
            self.library._flash_attn_varlen_backward(
                *given,
                infinite,
                *grads,
                cu_seqlens_q=params.cu_seq_q,
                cu_seqlens_k=params.cu_seq_k,
                max_seqlen_q=params.max_q,
                max_seqlen_k=params.max_k,
                **options,
                rng_state=state,
            )
        else:
            self.library._flash_attn_backward(*given, infinite, *grads, **options, rng_state=state)
        grad_query, *others = (convert.as_caller_reads(params, grad, params.query.shape[-1]) for grad in grads)
        sinks = convert.gradients_of_sinks(params, grad_out, out, lse)
        return grad_query if sign == 1 else grad_query * sign, *others, *sinks

    def fake(self, params: SDPAParams) -> tuple[Tensor, ...]:
        """Return empty tensors like those of forward."""
        lse = params.query.new_empty(params.lse_shape, dtype=torch.float32)
        like_query = torch.empty_like(convert.as_kernel_reads(params, params.query))
        out = convert.as_caller_reads(params, like_query, params.value.shape[-1])
        if 0 < params.dropout < 1:
            return out, lse, lse.new_empty(2, dtype=torch.int64)
        return out, lse

    def _options(self, params: SDPAParams) -> dict[str, Any]:
        left, right = convert.band(params)
        return {
            "dropout_p": params.dropout,
            "softmax_scale": params.scale,
            "causal": params.is_causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": params.softcap,
            "alibi_slopes": params.alibi_slopes,
        }


kernel = FlashAttn2("flash_attn.flash_attn_interface")
