"""Packed sequences on cuDNN: `(T, H, E)` and cumulative lengths, through PyTorch's operator.

Up to PyTorch 2.14 that path of the operator is unfinished: PyTorch's own `varlen_attn` does not take it, or not
for grouped heads, causal masks and short sequences, and its backward took the head size for the longest sequence
(https://github.com/pytorch/pytorch/pull/186142). What is accepted here is what the `varlen_attn` of 2.15 gives to
it, and what cuDNN's own tests cover: sequences without queries or keys from 9.25 on
(https://github.com/NVIDIA/cudnn-frontend/issues/943).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_efficient_cuda import layout, operators, sequences
from attnplug_efficient_cuda.sequences import Tokens

LEAST_VERSION = 92500
LARGE_HEADS = {
    False: {(192, 128), (192, 192), (256, 128), (256, 256)},
    True: {(192, 128)},
}
"""Head sizes beyond 128 of query and value on compute capability 10, without and with gradients."""
MINUS_INFINITY = float("-inf")


def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
    """Return `out (Tq, Hq, Ev)` and `lse (Hq, Tq)`."""
    used = params.cu_seq_k.diff()
    # Given the lengths of a cache of keys, the operator aligns a causal mask to the lower right, otherwise to the
    # upper left (`run_cudnn_SDP_fprop_nestedtensor` in `cudnn/MHA.cpp`).
    lengths = {"seqused_k": used} if params.is_causal else {}
    out, lse = operators.cudnn_forward(
        *_kernel_tensors(params),
        None,
        *_kernel_lengths(params),
        True,
        0.0,
        params.is_causal,
        False,
        scale=params.scale,
        **lengths,
    )[:2]
    band, queries = ((-1, 0), params.cu_seq_q.diff()) if params.is_causal else ((-1, -1), None)
    blind = sequences.blind(Tokens.of(params.cu_seq_q, params.query.shape[0]), used, band, queries)
    return layout.compact(sequences.clear(out, blind)), layout.compact(lse.masked_fill(blind, MINUS_INFINITY))


def backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """Return the gradients of query, key and value, zeros for tokens that meet nobody."""
    unused = torch.zeros((), dtype=torch.long, device=params.query.device)
    grads = operators.cudnn_backward(
        layout.packed(grad_out),
        *_kernel_tensors(params),
        layout.packed(out),
        lse,
        *(unused, unused, None),
        *_kernel_lengths(params),
        0.0,
        False,
        scale=params.scale,
    )
    queries, keys = params.cu_seq_q.diff(), params.cu_seq_k.diff()
    tokens_q, tokens_k = params.query.shape[0], params.key.shape[0]
    blind = sequences.blind(Tokens.of(params.cu_seq_q, tokens_q), keys, (-1, -1), None)
    idle = sequences.unused(Tokens.of(params.cu_seq_k, tokens_k), keys, queries)
    return tuple(sequences.clear(grad, nothing) for grad, nothing in zip(grads, (blind, idle, idle), strict=True))


def lacking(version: int | None) -> str:
    """Return what PyTorch or its cuDNN, of this `version`, lack for sequences; nothing if they have all."""
    if not operators.cudnn_takes_sequences():
        return (
            f"takes variable-length sequences from PyTorch 2.15 on, found {torch.__version__} "
            f"(aten::_cudnn_attention_forward: pytorch#186142, #191576, #195650)"
        )
    if version is not None and version < LEAST_VERSION:
        return f"needs cuDNN 9.25 for sequences, of which some may be empty; found {shown(version)}"
    return ""


def reasons(params: SDPAParams, gpu: tuple[int, int] | None, wants_grad: bool) -> list[str]:
    """Return what no cuDNN has for sequences like these, or not on this GPU."""
    found: list[str] = []
    size, value_size = params.query.shape[-1], params.value.shape[-1]
    if gpu is not None and gpu[0] not in (9, 10):
        found.append(f"takes sequences on compute capability 9 and 10 only, found {gpu[0]}.{gpu[1]}")
    if max(size, value_size) > 128 and not (
        gpu is not None and gpu[0] == 10 and (size, value_size) in LARGE_HEADS[wants_grad]
    ):
        where = "with gradients" if wants_grad else "without gradients"
        found.append(f"does not take sequences of head sizes {size} and {value_size} {where} on this GPU")
    if params.max_q == 1:
        found.append("does not take sequences of a single query each (cudnn-frontend#1083)")
    if params.is_causal and wants_grad:
        found.append("has a causal backward for sequences only from the upper left")
    tensors = (params.query, params.key, params.value)
    if any(tensor.shape[0] * max(tensor.stride(0), math.prod(tensor.shape[1:])) >= layout.INT32 for tensor in tensors):
        found.append("counts the elements of packed sequences with 32 bits")
    return found


def shown(version: int | None) -> str:
    """Return cuDNN's version as people write it."""
    return "none" if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _kernel_tensors(params: SDPAParams) -> tuple[Tensor, ...]:
    return tuple(layout.unshared(tensor) for tensor in (params.query, params.key, params.value))


def _kernel_lengths(params: SDPAParams) -> tuple[Tensor, Tensor, int, int]:
    """Return cumulative lengths that start where cuDNN can read them, and the longest sequences."""
    starts_q, starts_k = _readable(params.cu_seq_q), _readable(params.cu_seq_k)
    pairs = ((params.max_q, params.query), (params.max_k, params.key))
    longest_q, longest_k = (max(1, min(most, tensor.shape[0])) for most, tensor in pairs)
    return starts_q, starts_k, longest_q, longest_k


def _readable(starts: Tensor) -> Tensor:
    every = layout.step(starts.dtype)
    return starts if starts.is_contiguous() and starts.storage_offset() % every == 0 else starts.clone()
