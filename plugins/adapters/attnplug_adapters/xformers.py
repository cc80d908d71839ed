"""`xformers`: the memory-efficient attention of xFormers, whose dispatcher chooses among CUTLASS and flash kernels.

Written for 0.0.30 to 0.0.35 (`xformers/ops/fmha/__init__.py`, `attn_bias.py`, `dispatch.py`, `cutlass.py`, `flash.py`,
`flash3.py`). Tensors are `(B, S, H, E)`, packed sequences one batch of them; masks are objects, upper left and lower
right by different classes. `lse` is natural, its rows padded by CUTLASS and not by flash; of packed sequences CUTLASS
gives one for each sequence, flash one for all. Each kernel leaves something else in a row that sees no key,
so such rows are found here and cleared; plus infinity in their lse keeps them out of every backward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, compute_capability
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

HALF = (torch.float16, torch.bfloat16)
FLASH_HEAD_SIZE = 256
CAUSAL = (-1, 0)


class Interface:
    """The functions of `xformers.ops` that are called."""

    @staticmethod
    def memory_efficient_attention_forward_requires_grad(
        query: Any, key: Any, value: Any, attn_bias: Any = None, p: Any = 0.0, scale: Any = None
    ) -> Any: ...

    @staticmethod
    def memory_efficient_attention_backward(
        grad: Any,
        output: Any,
        lse: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: Any = 0.0,
        scale: Any = None,
    ) -> Any: ...


class XFormers(Adapter):
    """The kernel, on a module that has the functions of `Interface` and the masks of `fmha.attn_bias`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    def supports(self, params: SDPAParams) -> list[str]:
        """Return what no kernel of the library takes, or none on this GPU."""
        gpu, packed = compute_capability(params.query.device), params.is_varlen or params.seqused_k is not None
        band, cause = convert.band(params), self._not_flash(params)
        newest = getattr(self.library.fmha.cutlass.FwOp, "CUDA_MAXIMUM_COMPUTE_CAPABILITY", None)
        too_new = gpu is not None and newest is not None and gpu > newest
        reasons = []
        if cause and too_new:
            most = ".".join(map(str, newest or ()))
            reasons.append(f"has no kernel for {cause} above compute capability {most}")
        if packed and band != convert.OPEN and band[1] != 0:
            reasons.append("takes windows of packed sequences and with seqused_k only up to the diagonal: (left, 0)")
        if params.seqused_k is not None and not params.is_varlen:
            if params.attn_mask is not None:
                reasons.append("takes no attn_mask together with seqused_k")
            if not convert.is_lower_right(params) and band != convert.OPEN:
                reasons.append("takes seqused_k only with lower-right alignment")
        if params.needs_grad and cause and packed and band not in (convert.OPEN, CAUSAL):
            reasons.append(f"has no backward for windows of packed sequences and {cause}")
        if params.needs_grad and not cause and torch.are_deterministic_algorithms_enabled():
            others = {"packed sequences": packed, "windows": band not in (convert.OPEN, CAUSAL), "this GPU": too_new}
            reasons += [f"has no deterministic backward for {call}" for call, holds in others.items() if holds]
        return reasons

    def _not_flash(self, params: SDPAParams) -> str:
        """Return what the library's flash kernels do not take of a call, which leaves CUTLASS; nothing if they do."""
        gpu = compute_capability(params.query.device)
        moved = not params.is_varlen and params.seqused_k is None and params.query.shape[2] != params.key.shape[2]
        causes = {
            "float32": params.query.dtype not in HALF,
            "attn_mask": params.attn_mask is not None,
            f"head sizes above {FLASH_HEAD_SIZE}": self._size(params) > FLASH_HEAD_SIZE,
            "upper-left alignment": moved
            and convert.band(params) != convert.OPEN
            and not convert.is_lower_right(params),
            "compute capability below 8.0": gpu is not None and gpu < (8, 0),
            "a library without flash kernels": not self.library.fmha.flash.FwOp.is_available(),
        }
        return next((cause for cause, holds in causes.items() if holds), "")

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        """Return `out` and `lse`."""
        params, _ = params.with_positive_scale()
        if params.is_varlen:
            return self._packed(params)
        if params.seqused_k is not None:
            batch = params.query.shape[0]
            out, lse = self._packed(convert.as_tokens(params))
            return convert.from_tokens(out, batch), convert.lse_from_tokens(lse, batch)
        out, lse = self._run(params, self._bias(params))
        out = convert.as_caller_reads(params, out, params.value.shape[-1])
        lse = convert.first(lse, params.query.shape[2]).contiguous()
        return convert.with_sinks(params, *_cleared(params, out, lse))

    def _packed(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        sequences = _Sequences(params)
        out = params.query.new_zeros(*params.query.shape[:2], params.value.shape[-1])
        lse = out.new_full((out.shape[0], out.shape[1]), convert.MINUS_INFINITY, dtype=torch.float32)
        if not sequences.queries:
            return convert.with_sinks(params, out, lse.T.contiguous())
        found, raw = self._run(sequences.of(params), sequences.bias(self.library.fmha.attn_bias, params))
        found = convert.first(found[0], params.value.shape[-1])
        lse = sequences.put(sequences.flat(raw).T, lse).T.contiguous()
        return convert.with_sinks(params, sequences.put(found, out), lse)

    def _run(self, params: SDPAParams, bias: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.library.memory_efficient_attention_forward_requires_grad(
            *self._given(params), attn_bias=bias, scale=params.scale
        )
        return found

    def backward(
        self, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value and sinks; the kernels have none through lse."""
        params, sign = params.with_positive_scale()
        sinks = convert.gradients_of_sinks(params, grad_out, out, lse)
        if params.is_varlen:
            grads = self._packed_backward(params, grad_out, out, lse)
        elif params.seqused_k is not None:
            batch, tokens = params.query.shape[0], convert.as_tokens(params)
            grad_out, out = (convert.heads_behind(tensor).flatten(0, 1) for tensor in (grad_out, out))
            found = self._packed_backward(tokens, grad_out, out, lse.transpose(0, 1).flatten(1))
            grads = tuple(convert.from_tokens(grad, batch) for grad in found)
        else:
            blind = (lse == convert.MINUS_INFINITY).unsqueeze(-1)
            grad_out, out = grad_out.masked_fill(blind, 0.0), out.masked_fill(blind, 0.0)
            grads = self._gradients(params, grad_out, out, convert.blind_as_infinity(lse), self._bias(params))
        return (grads[0] if sign == 1 else grads[0] * sign, *grads[1:], *sinks)

    def _packed_backward(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        sequences = _Sequences(params)
        whole = [torch.zeros_like(tensor) for tensor in (params.query, params.key, params.value)]
        if not sequences.queries:
            return tuple(whole)
        grad_out, out, lse = sequences.rows(grad_out), sequences.rows(out), sequences.rows(lse.T).T
        given = sequences.padded(lse) if self._not_flash(params) else lse.unsqueeze(0).contiguous()
        bias = sequences.bias(self.library.fmha.attn_bias, params)
        grad_query, *others = self._gradients(sequences.of(params), grad_out, out, given, bias)
        found = (sequences.put(grad, zeros, keys=True) for grad, zeros in zip(others, whole[1:], strict=True))
        return sequences.put(grad_query, whole[0]), *found

    def _gradients(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, bias: Any) -> Any:
        kv_heads = params.key.shape[1]
        grads = self.library.memory_efficient_attention_backward(
            self._as_given(params, grad_out),
            self._as_given(params, out),
            lse,
            *self._given(params),
            attn_bias=bias,
            scale=params.scale,
        )
        grads = [grads[0], *(convert.sum_heads(grad, kv_heads) for grad in grads[1:])]
        grads = [grad.squeeze(0) if params.is_varlen else grad for grad in grads]
        sizes = (tensor.shape[-1] for tensor in (params.query, params.key, params.value))
        return tuple(convert.as_caller_reads(params, grad, size) for grad, size in zip(grads, sizes, strict=True))

    @staticmethod
    def _size(params: SDPAParams) -> int:
        """Return the head size that the kernels are given, the same for keys and values: not all of them take two."""
        return convert.rounded_up(max(params.query.shape[-1], params.value.shape[-1]), 8)

    def _as_given(self, params: SDPAParams, tensor: Tensor) -> Tensor:
        """Return a tensor as `(B, S, H, E)`; packed sequences are one batch."""
        tensor = convert.as_kernel_reads(params, convert.padded(tensor, self._size(params)))
        return tensor.unsqueeze(0) if params.is_varlen else tensor

    def _given(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as `(B, S, Hq, E)`; grouped heads are repeated: they have no backward."""
        heads = params.query.shape[1]
        query, key, value = (self._as_given(params, tensor) for tensor in (params.query, params.key, params.value))
        return query, convert.spread_heads(key, heads), convert.spread_heads(value, heads)

    def _bias(self, params: SDPAParams) -> Any:
        """Return the library's object for causal masks and windows, or a tensor for all else."""
        left, right = convert.band(params)
        if params.attn_mask is None and (left, right) == convert.OPEN:
            return None
        masks = self.library.fmha.attn_bias
        queries, keys = params.query.shape[2], params.key.shape[2]
        lower_right = convert.is_lower_right(params) or queries == keys
        if params.attn_mask is None and (left, right) == CAUSAL:
            return masks.LowerTriangularFromBottomRightMask() if lower_right else masks.LowerTriangularMask()
        if lower_right and not self._not_flash(params):
            return masks.LocalAttentionFromBottomRightMask(
                window_left=left if left >= 0 else keys, window_right=right if right >= 0 else keys
            )
        return _as_tensor(params)


class _Sequences:
    """Packed sequences as the library takes them: without queries that see no key, and keys that no query sees.

    Its masks refuse a sequence of more queries than keys, and have no gaps. Lengths are Python numbers, as in the
    library, so a call waits for the GPU.
    """

    def __init__(self, params: SDPAParams) -> None:
        causal = convert.band(params)[1] == 0
        firsts, counts = params.cu_seq_k[:-1].tolist(), convert.used_keys(params).tolist()
        self.queries: list[tuple[int, int]] = []
        self.keys: list[tuple[int, int]] = []
        for (start, stop), first, used in zip(pairwise(params.cu_seq_q.tolist()), firsts, counts, strict=True):
            seeing = min(stop - start, used) if causal else stop - start
            if seeing and used:
                self.queries.append((stop - seeing, stop))
                self.keys.append((first, first + used))
        self.lengths = [stop - start for start, stop in self.queries]
        self._rows, self._columns = (_index(ranges, params.query.device) for ranges in (self.queries, self.keys))

    def of(self, params: SDPAParams) -> SDPAParams:
        """Return the call of these queries and keys alone."""
        key, value = params.key[self._columns], params.value[self._columns]
        return replace(params, query=self.rows(params.query), key=key, value=value)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return what belongs to these queries of a tensor with a row for each query."""
        return tensor[self._rows]

    def put(self, tensor: Tensor, whole: Tensor, keys: bool = False) -> Tensor:
        """Write what belongs to these queries, or keys, into `whole`, and return that."""
        whole[self._columns if keys else self._rows] = tensor.to(whole.dtype)
        return whole

    def bias(self, masks: Any, params: SDPAParams) -> Any:
        """Return the library's mask."""
        device = params.query.device
        lengths = [stop - start for start, stop in self.keys]
        mask = masks.BlockDiagonalMask.from_seqlens(self.lengths, lengths, device=device)
        left, right = convert.band(params)
        if left >= 0:
            return mask.make_local_attention_from_bottomright(left + 1)
        return mask.make_causal_from_bottomright() if right == 0 else mask

    def flat(self, lse: Tensor) -> Tensor:
        """Return `(H, T)` of what a kernel gives: `(1, H, T)`, or `(B, H, S)` with rows that are padded."""
        if lse.shape[0] == 1:
            return convert.first(lse[0], sum(self.lengths))
        return torch.cat([part[:, :length] for part, length in zip(lse, self.lengths, strict=True)], 1)

    def padded(self, lse: Tensor) -> Tensor:
        """Return `(B, H, S)` of `(H, T)`, with plus infinity behind the rows of each sequence."""
        parts = [part.T for part in lse.split(self.lengths, 1)]
        return (
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=math.inf)
            .transpose(1, 2)
            .contiguous()
        )


def _index(ranges: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    """Return what selects all ranges, one after the other: a slice where they have no gaps, which copies nothing."""
    if all(before[1] == after[0] for before, after in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1]) if ranges else slice(0, 0)
    return torch.cat([torch.arange(*each, device="cpu") for each in ranges]).to(device)


def _as_tensor(params: SDPAParams) -> Tensor:
    """Return mask and band as one tensor to be added, `(B, Hq, Sq, Sk)`, its rows aligned to 16 bytes."""
    batch, heads, queries, keys = *params.query.shape[:3], params.key.shape[2]
    dtype = params.query.dtype
    memory = params.query.new_zeros(queries, convert.rounded_up(keys, 16), dtype=dtype)
    bias = memory[:, :keys]
    if (hidden := convert.hidden(params)) is not None:
        bias = bias.masked_fill_(hidden, convert.MINUS_INFINITY)
    if params.attn_mask is None:
        return bias.expand(batch, heads, queries, keys)
    mask = params.attn_mask.detach()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), convert.MINUS_INFINITY)
    shape = (*mask.shape[:2], queries, memory.shape[1])
    whole = params.query.new_empty(shape, dtype=dtype)[..., :keys]
    return whole.copy_(bias + mask.to(dtype)).expand(batch, heads, queries, keys)


def _cleared(params: SDPAParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out with 0, and lse with minus infinity, for rows that mask and band leave without a key."""
    if params.attn_mask is None:
        return convert.cleared(params, out, lse)
    seen = params.attn_mask if params.attn_mask.dtype == torch.bool else params.attn_mask != convert.MINUS_INFINITY
    if (hidden := convert.hidden(params)) is not None:
        seen = seen & ~hidden
    blind = seen.any(-1).logical_not()
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, convert.MINUS_INFINITY)


kernel = XFormers("xformers.ops")
