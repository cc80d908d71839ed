"""What the calls take by name, for type checkers: the calls' own signatures say the same, with defaults."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class PackedOptions(TypedDict, total=False):
    """Of `ring_varlen_attn`."""

    is_causal: bool
    scale: float | None
    enable_gqa: bool
    window_size: tuple[int, int]
    softcap: float
    sinks: Tensor | None
    dropout_p: float
    impl: str | None


class RingOptions(PackedOptions, total=False):
    """Of `ring_attention` and `usp_attention`."""

    seqused_k: Tensor | None
    length: int | None


class HeadsOptions(RingOptions, total=False):
    """Of `ulysses_attention`."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
