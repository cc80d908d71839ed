"""A call as plain data. Everything that makes, compares or explains a call reads these fields, and `Call` runs it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound="Fields")


@dataclass(frozen=True, kw_only=True, repr=False)
class Fields:
    """The fields of a `Call`, which says what each means."""

    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 40
    keys: int = 40
    head_size: int = 32
    value_head_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    mask: str = ""
    mask_dims: str = "bhqk"
    mask_dtype: str = ""
    dropout_p: float = 0.0
    is_causal: bool = False
    causal_variant: str = "UPPER_LEFT"
    scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""
    used: tuple[int, ...] | None = None
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    page_size: int | None = None
    lse: bool = False
    gradients: tuple[str, ...] = ()
    lse_gradient: bool = False
    values: str = "normal"
    layout: str = "contiguous"
    mask_layout: str = "contiguous"
    numbers_layout: str = "contiguous"
    poison: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        given = [
            (item.name, getattr(self, item.name)) for item in fields(self) if getattr(self, item.name) != item.default
        ]
        return f"Call({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def packed(self: F) -> F | None:
        """Return a call of `varlen_attn` with the same meaning, sequences of equal lengths; None if there is none."""
        aligned = self.is_causal or self.window_size != (-1, -1) or self.alibi
        other = aligned and self.queries != self.keys and self.causal_variant != "LOWER_RIGHT"
        if self.is_varlen or self.mask or other:
            return self if self.is_varlen else None
        lengths: dict[str, Any] = {"lengths_q": (self.queries,) * self.batch, "lengths_k": (self.keys,) * self.batch}
        return replace(self, **lengths, causal_variant="LOWER_RIGHT")

    @property
    def is_varlen(self) -> bool:
        return self.lengths_q is not None
