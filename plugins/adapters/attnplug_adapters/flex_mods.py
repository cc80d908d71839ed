"""A call of attnplug as the two functions that `flex_attention` compiles: one of logits, one of the mask.

Packed sequences become one long sequence in which each token sees its own alone, pages are gathered before,
and keys that are not used are zero, so that nothing of what lies outside reaches a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attnplug import SDPAParams
from attnplug_adapters import convert

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_FAR = 2**30
_ROOM = 128


@dataclass(frozen=True)
class Positions:
    """Where queries and keys stand, for masks and distances.

    Attributes:
        offset: of a dense call, the key position of query 0; with `seqused_k` it may differ by batch.
        row: of packed tokens, the key position at which each query stands.
        row_sequence: of packed tokens, the sequence of each query; -1 in none.
        column: of packed tokens, the position of each key in its sequence.
        column_sequence: of packed tokens, the sequence of each key; -2 if it is not used.
        used: of a dense call, `seqused_k`.
    """

    offset: Any = 0
    used: Tensor | None = None
    row: Tensor | None = None
    row_sequence: Any = None
    column: Any = None
    column_sequence: Any = None

    @classmethod
    def of(cls, params: SDPAParams) -> Positions:
        if params.is_varlen:
            return _packed(params)
        queries, keys, used = params.query.shape[2], params.key.shape[2], params.seqused_k
        if not convert.is_lower_right(params):
            return cls(offset=0, used=used)
        return cls(offset=keys - queries if used is None else used - queries, used=used)

    @property
    def by_batch(self) -> bool:
        return self.used is not None

    @property
    def is_plain(self) -> bool:
        """Whether all follows from lengths and offset."""
        return self.used is None and self.row is None

    def distance(self, device: torch.device) -> Mod:
        """Return how far to the right of query `i`'s own position key `j` stands."""
        if self.row is not None:
            return _between_tokens(held(self.row, 1), held(self.column, 1))
        if isinstance(self.offset, Tensor):
            return _from_diagonals(held(self.offset, 0))
        return _from_diagonal(numbers((self.offset,), device))


def dense(params: SDPAParams, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as `(B, H, S, E)`, unused keys and values zero."""
    query, key, value = params.query, params.key, params.value
    if positions.row is None:
        if positions.used is None:
            return query, key, value
        unused = torch.arange(key.shape[2], device=key.device)[:, None] >= positions.used.view(-1, 1, 1, 1)
        return query, key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    if params.block_table is not None:
        table = params.block_table.long().clamp(0, key.shape[0] - 1)
        key, value = (tensor[table].flatten(0, 2) for tensor in (key, value))
    unused = (positions.column_sequence < 0).view(-1, 1, 1)
    key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    return query, key, value


def _packed(params: SDPAParams) -> Positions:
    sequence, position, outside = convert.tokens_of(params.cu_seq_q, params.query.shape[0])
    used = convert.used_keys(params)
    row = position + (used - params.cu_seq_q.diff())[sequence]
    if params.block_table is None:
        key_sequence, column, nowhere = convert.tokens_of(params.cu_seq_k, params.key.shape[0])
    else:
        batch, length = params.block_table.shape[0], params.block_table.shape[1] * params.key.shape[1]
        token = torch.arange(batch * length, device=row.device, dtype=torch.int32)
        key_sequence, column = token // length, token % length
        nowhere = torch.zeros_like(token, dtype=torch.bool)
    unused = nowhere | (column >= used[key_sequence])
    return Positions(
        row=row,
        row_sequence=sequence.masked_fill(outside, -1),
        column=column,
        column_sequence=key_sequence.masked_fill(unused, -2),
    )


def mask_mod(params: SDPAParams, positions: Positions) -> Mod | None:
    """Return which keys are seen; None if all are."""
    parts: list[Mod] = []
    if positions.row is not None:
        parts.append(_same_sequence(positions))
    if positions.used is not None:
        parts.append(_used(held(positions.used, 0)))
    left, right = convert.band(params)
    if (left, right) != convert.OPEN:
        if positions.is_plain:
            parts.append(band_mod(ends(positions.offset, (left, right), params.query.device)))
        else:
            limits = ends(0, (left, right), params.query.device)
            parts.append(_within(positions.distance(params.query.device), limits))
    if params.attn_mask is not None and params.attn_mask.dtype == torch.bool:
        parts.append(_allowed(_full(params)))
    return reduce(_both, parts) if parts else None


def score_mod(params: SDPAParams, positions: Positions) -> Any:
    """Return what becomes of a logit; None if nothing."""
    parts: list[Any] = []
    if params.softcap > 0:
        parts.append(_capped(numbers((params.softcap,), params.query.device)))
    if params.alibi_slopes is not None:
        slope = _slope(params.alibi_slopes, positions)
        parts.append(_sloped(slope, positions.distance(params.query.device)))
    if params.attn_mask is not None and params.attn_mask.dtype != torch.bool:
        parts.append(_biased(_full(params)))
    return reduce(_then, parts) if parts else None


def band_mod(limits: Tensor) -> Mod:
    """Return the mask of a band, `limits[0] <= j - i <= limits[1]`."""

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i >= limits[0]) & (j - i <= limits[1])

    return band


def ends(offset: int, band: tuple[int, int], device: torch.device) -> Tensor:
    """Return the least and the largest `j - i` that a band sees."""
    left, right = band
    return numbers((offset - left if left >= 0 else -_FAR, offset + right if right >= 0 else _FAR), device)


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor, which a compiled kernel takes as an argument."""
    if is_captured():  # nor can numbers be copied from the host, which waits for the GPU
        made = torch.empty(len(values), dtype=torch.tensor(values).dtype, device=device)
        for at, value in enumerate(values):
            made[at] = value
        return held(made, 0)
    return torch.tensor(values, device=device) if is_watched() else _kept(values, device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may be saved for a backward later
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    return held(torch.tensor(values, device=device), 0)


def is_watched() -> bool:
    """Whether a trace or a mode looks on: tensors may be fake, must not be kept, and have no memory to be read."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_captured() -> bool:
    """Whether a CUDA graph is captured. Its memory is its own, so nothing made in it may be kept for other calls.

    What is kept may not be used in it either: a graph may outlive it. A trace is of no graph of CUDA's, and cannot ask.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def held(tensor: Tensor, lengths: int) -> Tensor:
    """Return a tensor for a function to look numbers up in, its last so many dimensions lengths.

    On a CPU its sizes are constants of a kernel: there they are rounded up to powers of two, so that kernels are few.
    """
    if not is_constant(tensor.device):
        return tensor
    sizes = _rounded(tuple(tensor.shape), lengths)
    missing = [(0, size - have) for size, have in zip(sizes, tensor.shape, strict=True)]
    return _constant(pad(tensor, [side for sides in reversed(missing) for side in sides]))


def is_constant(device: torch.device) -> bool:
    """Whether sizes of what a function looks numbers up in are constants of a kernel.

    With sizes that vary, what PyTorch 2.13 generates for a CPU names variables that do not exist
    (`cur_kvSplitSize5`), or takes one for another. In a trace its owner decides which sizes vary.
    """
    return device.type == "cpu" and not is_watched()


def _constant(tensor: Tensor) -> Tensor:
    """Return an alias of a tensor whose sizes are constants for `torch.compile`."""
    alias = tensor.detach()
    torch._dynamo.mark_static(alias)
    return alias


def _rounded(sizes: tuple[int, ...], lengths: int) -> tuple[int, ...]:
    others = len(sizes) - lengths
    least = (1,) * others + (_ROOM,) * lengths
    return tuple(
        size if size == 1 else max(1 << (size - 1).bit_length(), low) for size, low in zip(sizes, least, strict=True)
    )


def _from_diagonal(offset: Tensor) -> Mod:
    def distance(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j - i - offset[0]

    return distance


def _from_diagonals(offsets: Tensor) -> Mod:
    def distance(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j - i - offsets[b]

    return distance


def _between_tokens(rows: Tensor, columns: Tensor) -> Mod:
    def distance(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return columns[j] - rows[i]

    return distance


def _slope(slopes: Tensor, positions: Positions) -> Mod:
    """Return the slope of ALiBi, of a head or of a head and batch or sequence."""
    slopes = held(slopes, 0)
    if slopes.dim() == 1:
        return lambda b, h, i, j: slopes[h]
    if positions.row is None:
        return lambda b, h, i, j: slopes[b, h]
    sequences = held(positions.row_sequence.clamp(min=0), 1)
    return lambda b, h, i, j: slopes[sequences[i], h]


def _capped(softcap: Tensor) -> Any:
    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap[0] * torch.tanh(logit / softcap[0])

    return score


def _sloped(slope: Mod, distance: Mod) -> Any:
    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return logit - slope(b, h, i, j) * distance(b, h, i, j).abs()

    return score


def _biased(bias: Tensor) -> Any:
    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return logit + bias[b, h, i, j]

    return score


def _then(one: Any, other: Any) -> Any:
    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return other(one(logit, b, h, i, j), b, h, i, j)

    return score


def _same_sequence(positions: Positions) -> Mod:
    rows, columns = held(positions.row_sequence, 1), held(positions.column_sequence, 1)

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rows[i] == columns[j]

    return same


def _used(used: Tensor) -> Mod:
    def exists(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < used[b]

    return exists


def _within(distance: Mod, limits: Tensor) -> Mod:
    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = distance(b, h, i, j)
        return (found >= limits[0]) & (found <= limits[1])

    return within


def _allowed(mask: Tensor) -> Mod:
    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b, h, i, j]

    return allowed


def _both(one: Mod, other: Mod) -> Mod:
    def both(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return one(b, h, i, j) & other(b, h, i, j)

    return both


def _full(params: SDPAParams) -> Tensor:
    """Return the mask expanded to `(B, Hq, Sq, Sk)`, or more as `held` has it, without a copy of what it repeats."""
    mask = params.attn_mask
    assert mask is not None
    batch, heads, queries, _ = params.query.shape
    sizes = (batch, heads, queries, params.key.shape[2])
    if not is_constant(mask.device):
        return mask.expand(sizes)
    return _constant(held(mask, 2).expand(_rounded(sizes, 2)))
