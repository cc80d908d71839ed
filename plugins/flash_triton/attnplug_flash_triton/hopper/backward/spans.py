"""Sequences, what of them is visible to what, and logits: what the backward kernels know of a call."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnplug_flash_triton.hopper.device import exp2

FAR = gl.constexpr(2**30)
"""A position behind everything that a query can see."""

# Arguments that are not compiled in, so that a kernel is compiled once for all lengths.
RUNTIME = [
    *("heads", "group", "num_q", "num_k", "k_rows", "left", "right", "q_tiles", "tiles", "columns", "section"),
    *("logit_scale", "inner_scale", "scale"),
]


class Call(NamedTuple):
    """Lengths and sizes of a call, and how its tiles are counted: see `key_gradients_kernel`."""

    cu_q: Any
    cu_k: Any
    used: Any
    heads: Any
    group: Any
    num_q: Any
    num_k: Any
    k_rows: Any
    left: Any
    right: Any
    q_tiles: Any
    tiles: Any
    columns: Any
    section: Any


@gluon.jit
def sequence(batch, call, LOWER_RIGHT: gl.constexpr):
    """Return (first query, queries, first key, keys, keys that exist, low, high) of a sequence.

    Query i sees keys from i + low to i + high.
    """
    if call.cu_q is not None:
        first_q = gl.load(call.cu_q + batch)
        first_k = gl.load(call.cu_k + batch)
        len_q = gl.load(call.cu_q + batch + 1) - first_q
        all_k = gl.load(call.cu_k + batch + 1) - first_k
    else:
        first_q = batch * 0
        first_k = batch * call.k_rows
        len_q = call.num_q
        all_k = call.num_k
    len_k = gl.load(call.used + batch) if call.used is not None else all_k
    offset = len_k - len_q if LOWER_RIGHT else 0
    return first_q, len_q, first_k, all_k, len_k, offset - call.left, offset + call.right


@gluon.jit
def first_query_tile(batch, head, first_q, call, M: gl.constexpr):
    """Return the number of a sequence's first tile of M queries, in what has a place for each."""
    if call.cu_q is not None:
        return head * call.q_tiles + first_q // M + batch  # a sequence may begin and end within a tile
    else:
        return (batch * call.heads + head) * call.q_tiles


@gluon.jit
def queries_of(
    first_key, len_q, len_k, low, high, KEYS: gl.constexpr, M: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return (begin, end) of the tiles of queries that see any of `KEYS` keys."""
    begin = 0
    end = len_q
    if HAS_HIGH:
        begin = gl.maximum(first_key - high, 0) // M
    if HAS_LOW:
        end = gl.maximum(gl.minimum(end, gl.minimum(first_key + KEYS, len_k) - low), 0)
    end = gl.maximum((end + M - 1) // M, begin)
    return begin, gl.where(first_key < len_k, end, begin)


@gluon.jit
def keys_of(
    first_query, len_k, low, high, QUERIES: gl.constexpr, N: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return (begin, end) of the tiles of keys that any of `QUERIES` queries sees, at least one tile."""
    begin = 0
    end = len_k
    if HAS_HIGH:
        end = gl.minimum(end, first_query + QUERIES + high)
    if HAS_LOW:
        begin = gl.maximum(first_query + low, 0) // N
    return begin, gl.maximum((end + N - 1) // N, begin + 1)


@gluon.jit
def _on_edge(
    first_key, first_query, len_k, low, high, KEYS: gl.constexpr, QUERIES: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Whether not every one of some queries sees every one of some keys."""
    edge = first_key + KEYS > len_k
    if HAS_HIGH:
        edge = edge | (first_query + high < first_key + KEYS - 1)
    if HAS_LOW:
        edge = edge | (first_query + QUERIES - 1 + low > first_key)
    return edge


@gluon.jit
def _masked(
    x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return `x`, -inf where a query does not see a key."""
    layout: gl.constexpr = x.type.layout
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    if KEYS_IN_ROWS:
        keys = first_key + rows
        queries = first_query + columns
    else:
        keys = first_key + columns
        queries = first_query + rows
    keys = gl.where(keys < len_k, keys, FAR)
    seen = keys <= queries + high if HAS_HIGH else keys < FAR
    if HAS_LOW:
        seen = seen & (keys >= queries + low)
    return gl.where(seen, x, float("-inf"))


@gluon.jit
def hidden(
    x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS: gl.constexpr, EVEN: gl.constexpr,
    SOFTCAP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return `x`, -inf where a query does not see a key. `SOFTCAP`: in every tile, since a branch takes registers."""
    KEYS: gl.constexpr = x.shape[0] if KEYS_IN_ROWS else x.shape[1]
    QUERIES: gl.constexpr = x.shape[1] if KEYS_IN_ROWS else x.shape[0]
    if EVEN:
        return x
    elif SOFTCAP:
        return _masked(x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS, HAS_LOW, HAS_HIGH)
    else:
        if _on_edge(first_key, first_query, len_k, low, high, KEYS, QUERIES, HAS_LOW, HAS_HIGH):
            x = _masked(x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS, HAS_LOW, HAS_HIGH)
        return x


@gluon.jit
def shifted_logits(s, lse, logit_scale, inner_scale, SOFTCAP: gl.constexpr):
    """Return (logits less lse, in powers of two; the derivative of the softcap)."""
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (exp2(s * inner_scale) + 1.0)
        return tanh * logit_scale - lse, 1.0 - tanh * tanh
    else:
        return s * logit_scale - lse, 1.0
