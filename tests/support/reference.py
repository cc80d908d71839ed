"""Attention in float64 numpy, one query at a time, to hold every implementation against.

It follows "Semantics of one call" of the contract, number by number, and shares no code with attnplug.
Arguments have the names of `attnplug.scaled_dot_product_attention`; tensors are accepted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LOWER_RIGHT = 2


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *,
    is_causal: bool = False,
    causal_variant: int = 1,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    seqused_k: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return out `(B, Hq, Sq, Ev)` and lse `(B, Hq, Sq)`.

    Args:
        query: `(B, Hq, Sq, E)`.
        key: `(B, Hkv, Sk, E)`.
        value: `(B, Hkv, Sk, Ev)`.
    """
    query, key, value = as_array(query), as_array(key), as_array(value)
    (batch, heads, queries, size), (_, kv_heads, keys, _) = query.shape, key.shape
    assert heads == kv_heads or enable_gqa
    scale = size**-0.5 if scale is None else scale
    mask = None if attn_mask is None else np.broadcast_to(as_array(attn_mask), (batch, heads, queries, keys))
    slopes = None if alibi_slopes is None else np.broadcast_to(as_array(alibi_slopes), (batch, heads))
    used = [keys] * batch if seqused_k is None else as_array(seqused_k).tolist()
    sinks = [-np.inf] * heads if sinks is None else as_array(sinks).tolist()
    out, lse = np.zeros((batch, heads, queries, value.shape[3])), np.zeros((batch, heads, queries))
    for b, h, i in np.ndindex(batch, heads, queries):
        kv_head = h // (heads // kv_heads)  # 11
        j = np.arange(used[b])  # 12
        position = i + (used[b] - queries if causal_variant == LOWER_RIGHT else 0)  # 5
        logits = scale * key[b, kv_head, j] @ query[b, h, i]  # 1
        if softcap > 0:  # 2
            logits = softcap * np.tanh(logits / softcap)
        if slopes is not None:  # 3
            logits = logits - slopes[b, h] * np.abs(position - j)
        seen = np.ones(len(j), dtype=bool)
        if mask is not None and mask.dtype == bool:  # 4
            seen &= mask[b, h, i, j]
        elif mask is not None:
            logits = logits + mask[b, h, i, j]
        if is_causal:  # 5
            seen &= j <= position
        left, right = window_size  # 6
        seen &= (left < 0) | (position - left <= j)
        seen &= (right < 0) | (j <= position + right)
        probabilities, lse[b, h, i] = softmax(logits[seen], sinks[h])  # 7, 8, 9, 10
        out[b, h, i] = probabilities @ value[b, kv_head, j[seen]]
    return out, lse


def softmax(logits: np.ndarray, sink: float) -> tuple[np.ndarray, float]:
    """Return the probabilities and the natural log of the denominator, which the sink is part of."""
    everything = np.append(logits, sink)
    top = everything.max()
    if top == -np.inf:
        return np.zeros(len(logits)), -np.inf
    total = np.exp(everything - top).sum()
    return np.exp(logits - top) / total, top + np.log(total)


def as_array(tensor: Any) -> np.ndarray:
    """Return a tensor as an array: floats as float64, all else as it is."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return np.asarray(tensor)
