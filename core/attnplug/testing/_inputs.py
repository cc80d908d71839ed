"""From a `Call` to tensors: numbers, masks, sequences and pages, and where they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnplug._types import CausalVariant
from attnplug.testing._fields import Fields
from attnplug.testing._validate import check

NAN = float("nan")
NUMBERS = frozenset({"cu_seq_q", "cu_seq_k", "seqused_k", "block_table", "sinks", "alibi_slopes"})
"""The tensors of a call that hold no tokens and no mask."""
GUARD = 4096
"""Elements of NaN on either side of a guarded tensor; a multiple of any alignment that a kernel may want."""


@dataclass
class Inputs:
    """The tensors of a call, as its arguments.

    Attributes:
        arguments: for `attnplug.scaled_dot_product_attention`, or `varlen_attn` if `cu_seq_q` is among them.
        grad_out: the gradient of out that backward starts from.
        grad_lse: the same of lse.
        call: what they were made of, if they were: it makes equal ones.
    """

    arguments: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor
    call: Fields | None = field(default=None, repr=False)


def make(call: Fields) -> Inputs:
    """Make the tensors of a call.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it.
    """
    check(call, tuple(VALUES), tuple(LAYOUTS))
    with torch.device("cpu"):  # whose generator it is, whatever the program's default device is
        return _made(call)


def _made(call: Fields) -> Inputs:
    generator = torch.Generator().manual_seed(int(call.seed))
    shapes = _shapes(call)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    query, key, value = VALUES[call.values](call, tensors["query"], tensors["key"], tensors["value"])
    mask = _mask(call, generator) if call.mask else None
    place = LAYOUTS[call.layout]
    arguments: dict[str, Any] = {
        "query": place(_cast(call, query)),
        "is_causal": call.is_causal,
        "dropout_p": call.dropout_p,
        "scale": call.scale,
        "enable_gqa": call.kv_heads not in (None, call.heads),
        "window_size": call.window_size,
        "softcap": call.softcap,
        "return_lse": call.lse,
    }
    sequences = _Sequences(call, generator)
    for name, tensor in (("key", key), ("value", value)):
        arguments[name] = place(_cast(call, sequences.arrange(tensor)))
    arguments |= sequences.arguments()
    if not call.is_varlen:
        arguments["causal_variant"] = CausalVariant[call.causal_variant]
    if mask is not None:
        arguments["attn_mask"] = LAYOUTS[call.mask_layout](mask.to(call.device))
    numbers = torch.float64 if call.dtype == "float64" else torch.float32
    if call.sinks:
        sinks = torch.randn(call.heads, generator=generator, dtype=torch.float64)
        arguments["sinks"] = sinks.to(call.device, numbers)
    if call.alibi:
        shape = (sequences.batch, call.heads) if call.alibi == "bh" else (call.heads,)
        arguments["alibi_slopes"] = (torch.rand(shape, generator=generator).to(numbers) * 0.3).to(call.device)
    for name in NUMBERS & arguments.keys():
        arguments[name] = _numbers(name, arguments[name], call.numbers_layout)
    if missing := [name for name in call.gradients if name not in arguments]:
        raise ValueError(f"gradients: the call has no {missing[0]}")
    grad_out, grad_lse = _cast(call, tensors["grad_out"]), tensors["grad_lse"].to(call.device)
    return Inputs(arguments, grad_out, grad_lse, call)


def _shapes(call: Fields) -> dict[str, tuple[int, ...]]:
    size, value_size = call.head_size, call.value_head_size or call.head_size
    kv_heads = call.kv_heads or call.heads
    if call.lengths_q is not None:
        queries, keys = sum(call.lengths_q), sum(call.lengths_k or ())
        rows, keys_at, lse = [queries, call.heads], [keys, kv_heads], [call.heads, queries]
    else:
        rows, keys_at = [call.batch, call.heads, call.queries], [call.batch, kv_heads, call.keys]
        lse = rows
    return {
        "query": (*rows, size),
        "key": (*keys_at, size),
        "value": (*keys_at, value_size),
        "grad_out": (*rows, value_size),
        "grad_lse": tuple(lse),
    }


def _cast(call: Fields, tensor: Tensor) -> Tensor:
    return tensor.to(call.torch_dtype).to(call.device)


# Numbers: each function gets standard normal query, key and value and returns what the call shall have.


def _large(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query `i` selects a key by a product of 40,000, just below float16's largest number.

    Nothing overflows in the formula, but every bare exponential does; and since all else is 0, no rounding
    of so large a logit shows in out.
    """
    query, key, _ = _selecting(call, query, key, value)
    return query * 6.25, key * 6.25, value * 100


def _along(call: Fields, query: Tensor, key: Tensor, steps: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Add `steps`, one for each key, to the logits, nearly; the query's part of the product is `share`."""
    scale = call.scale or call.head_size**-0.5
    direction = torch.zeros(call.head_size, dtype=torch.float64)
    direction[0] = 1.0
    shape = (-1, 1, 1) if call.is_varlen else (-1, 1)
    query = query * 0.5 * (1 - direction) + share * direction
    return query, key * (1 - direction) + steps.reshape(shape) / (share * scale) * direction


def _growing(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that rise from key to key, so that a running maximum changes in every block."""
    return *_along(call, query, key, _steps(call, key, 24.0), 4.0), value


def _rising(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, gently: gradients are differences of large sums if keys grow too much."""
    return *_along(call, query, key, _steps(call, key, 6.0), 12.0), value


def _steps(call: Fields, key: Tensor, rise: float) -> Tensor:
    return torch.linspace(0, rise, key.shape[0 if call.is_varlen else 2], dtype=torch.float64)


def _shrinking(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that fall from key to key: the first block holds the maximum."""
    query, key, value = _growing(call, query, key, value)
    return query, key.flip(0 if call.is_varlen else 2), value


def _negative(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits so far below 0 that every bare exponential is 0."""
    far = -800.0 if call.dtype == "float64" else -150.0
    return *_along(call, query, key, torch.full_like(_steps(call, key, 0.0), far), 4.0), value


def _raised(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values around 10, whose sums grow from key to key: what an accumulator rounds adds up."""
    return query, key, value + 10


def _selecting(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers: query `i` selects the keys `j` that equal `i` modulo the head size, by products of 1024.

    With a scale near 1 all other probabilities are exactly 0, and the selected keys share theirs equally.
    """
    size = call.head_size
    hot = torch.eye(size, dtype=torch.float64)
    i, j = torch.arange(query.shape[-2]), torch.arange(key.shape[-2])
    integers = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
    return 32 * hot[i % size].expand_as(query), 32 * hot[j % size].expand_as(key), integers % 13 - 6


def _identity(call: Fields, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values that are the identity in each sequence: out shows the probabilities themselves."""
    lengths = call.lengths_k or (call.keys,)
    rows = [torch.eye(length, value.shape[-1], dtype=torch.float64) for length in lengths]
    identity = torch.cat(rows)
    return query, key, (identity[:, None] if call.is_varlen else identity).expand_as(value)


VALUES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "normal": lambda call, query, key, value: (query, key, value),
    "large": _large,
    "growing": _growing,
    "rising": _rising,
    "shrinking": _shrinking,
    "negative": _negative,
    "raised": _raised,
    "selecting": _selecting,
    "identity": _identity,
}


def _mask(call: Fields, generator: torch.Generator) -> Tensor:
    """A mask whose every row sees the first key, except, with `blind`, each third row, which sees none."""
    full = dict(b=call.batch, h=call.heads, q=call.queries, k=call.keys)
    shape = [full.get(letter, 1) for letter in call.mask_dims]
    seen = torch.rand(shape, generator=generator) < 0.7
    seen[..., 0] = True
    if "blind" in call.mask and len(shape) > 1:
        seen[..., ::3, :] = False
    if "boolean" in call.mask:
        return seen
    mask = torch.randn(shape, generator=generator).to(getattr(torch, call.mask_dtype or call.dtype))
    return mask.masked_fill(~seen, -float("inf")) if "inf" in call.mask or "blind" in call.mask else mask


class _Sequences:
    """Where the keys of each sequence are: in a row, only some of them used, or in shuffled pages."""

    def __init__(self, call: Fields, generator: torch.Generator) -> None:
        self.call = call
        self.batch = len(call.lengths_q) if call.lengths_q is not None else call.batch
        self.lengths = call.lengths_k if call.lengths_k is not None else (call.keys,) * call.batch
        self.used = call.used if call.used is not None else self.lengths
        if call.page_size is not None:
            most = max(-(-length // call.page_size) for length in self.lengths)
            self.table = torch.randperm(self.batch * most + 3, generator=generator)[:-3].reshape(self.batch, most).int()

    def arrange(self, tokens: Tensor) -> Tensor:
        """Return keys or values as the call has them; what is not used is NaN if the call poisons it."""
        call = self.call
        if not call.is_varlen:
            if call.poison:
                for b, used in enumerate(self.used):
                    tokens[b, :, used:] = NAN
            return tokens
        parts = list(tokens.split(list(self.lengths)))
        if call.poison:
            parts = [torch.cat([part[:n], part[n:] * NAN]) for part, n in zip(parts, self.used, strict=True)]
        return torch.cat(parts) if call.page_size is None else self._pages(parts, call.page_size)

    def _pages(self, parts: list[Tensor], page_size: int) -> Tensor:
        filler = NAN if self.call.poison else 7.0
        pages = torch.full((self.table.numel() + 3, page_size, *parts[0].shape[1:]), filler, dtype=torch.float64)
        for entries, part in zip(self.table, parts, strict=True):
            for entry, page in zip(entries.tolist(), part.split(page_size), strict=False):
                pages[entry, : page.shape[0]] = page
        return pages

    def arguments(self) -> dict[str, Any]:
        call = self.call
        given: dict[str, Any] = {}
        if call.used is not None:
            given["seqused_k"] = torch.tensor(call.used, dtype=torch.int32, device=call.device)
        if call.lengths_q is None:
            return given
        given |= {"max_q": max(call.lengths_q, default=0), "max_k": max(self.lengths, default=0)}
        given |= {"cu_seq_q": _cumulative(call, call.lengths_q), "cu_seq_k": _cumulative(call, self.lengths)}
        if call.page_size is not None:
            given["block_table"] = self.table.to(call.device)
        return given


def _cumulative(call: Fields, lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(call.device, torch.int32)


# Memory: each function returns a tensor of equal values that lies differently.


def _guarded(tensor: Tensor, before: int = GUARD) -> Tensor:
    """Contiguous, in the middle of memory full of NaN (True for a mask of booleans)."""
    filler = NAN if tensor.is_floating_point() else True
    memory = torch.full((before + tensor.numel() + GUARD,), filler, dtype=tensor.dtype, device=tensor.device)
    inside = own_view(memory, before, tensor.shape)
    return inside.copy_(tensor)


def own_view(memory: Tensor, offset: int, shape: Any) -> Tensor:
    """Return a contiguous tensor of `shape` in `memory` that autograd does not take for a view of it."""
    strides = torch.zeros(shape, device="meta").stride()
    empty = torch.tensor([], dtype=memory.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, shape, strides)


def _framed(tensor: Tensor) -> Tensor:
    """The inside of a larger tensor of NaN: whoever goes one step too far in any dimension reads it."""
    filler = NAN if tensor.is_floating_point() else True
    frame = torch.full([size + 4 for size in tensor.shape], filler, dtype=tensor.dtype, device=tensor.device)
    inside = frame[tuple(slice(2, -2) for _ in tensor.shape)]
    return inside.copy_(tensor)


def _strided(tensor: Tensor) -> Tensor:
    """Every second element of a last dimension in which each lies twice: lengths and pages read amiss exist, too."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def _transposed(tensor: Tensor) -> Tensor:
    """Heads and positions swapped in memory, as they come out of one linear projection."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2) if tensor.dim() > 2 else tensor


def _column_major(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def _numbers(name: str, tensor: Tensor, layout: str) -> Tensor:
    """Lay out lengths, pages, sinks or slopes; with `expanded`, all but sums of lengths, which are not equal."""
    if layout != "expanded":
        return LAYOUTS[layout](tensor)
    return tensor if name in ("cu_seq_q", "cu_seq_k") else tensor[:1].expand(tensor.shape)


def _expanded(tensor: Tensor) -> Tensor:
    """One head for all, by a stride of 0: the same as its contiguous copy."""
    return tensor[..., :1, :, :].expand(tensor.shape) if tensor.dim() > 2 else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
    "strided": _strided,
    "column-major": _column_major,
    "expanded": _expanded,
    "offset": lambda tensor: _guarded(tensor, GUARD + 24),
    "misaligned": lambda tensor: _guarded(tensor, GUARD + 1),
    "guarded": _guarded,
    "framed": _framed,
}
