"""The record of one call, which a kernel's forward receives.

Nothing here imports torch before a property needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from attnplug._tables import WIDTH, html_table

if TYPE_CHECKING:
    from torch import Tensor, dtype

MaybeNone = Any
"""In the type of a field that is None where a call does not have it, or before it is prepared.

As in typeshed, the type checker requires no test for None: a kernel knows from `is_varlen` and from the features that
it declares which fields are set.
"""

OPEN_WINDOW = (-1, -1)
"""The one tuple that an unrestricted window is in a checked call."""

WIDEST = 2**30
"""Of a window's sides: kernels add them to positions in 32 bits."""


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether one of these tensors requires a gradient, or has in it one that does: `vmap` hides it."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    import torch

    if torch.compiler.is_dynamo_compiling():  # which cannot ask
        return False
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
            if tensor.requires_grad:
                return True
    return False


def params_of(fields: dict[str, Any]) -> SDPAParams:
    """Build the record of a call without the frozen dataclass's `__init__`, which costs more than a kernel's launch.

    Fields that are not given read as the class's defaults.
    """
    params = object.__new__(SDPAParams)
    object.__setattr__(params, "__dict__", fields)
    return params


class CausalVariant(IntEnum):
    """Where the diagonal of query and key positions starts; values of `torch.nn.attention.bias.CausalVariant`.

    With `Sq` queries and `Sk` keys, query `i` stands at key position `i + off`: `off = 0` for
    `UPPER_LEFT` (PyTorch's meaning of `is_causal`), `off = Sk - Sq` for `LOWER_RIGHT`
    (FlashAttention's). Causal masks, windows and ALiBi distances all count from there.
    """

    UPPER_LEFT = 1
    LOWER_RIGHT = 2


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, tuple))


def _shown(value: Any) -> str:
    if hasattr(value, "requires_grad") and hasattr(value, "dtype"):  # a tensor
        where = "" if value.device.type == "cpu" else f" {value.device}"
        grad = " requires_grad" if value.requires_grad else ""
        shape = "[nested]" if value.is_nested else list(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}{shape}{where}{grad}"
    return value.name if isinstance(value, CausalVariant) else repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class SDPAParams:
    """A read-only description of one call; building one checks nothing.

    The first seven fields are those of `torch.backends.cuda.SDPAParams`, in its order. What a kernel's
    forward receives is such a description, already validated and normalized:

    * dense: `query (B, Hq, Sq, E)`, `key (B, Hkv, Sk, E)`, `value (B, Hkv, Sk, Ev)`, `attn_mask` of
      four dimensions, each 1 or the full size of `(B, Hq, Sq, Sk)`;
    * variable length: `query (Tq, Hq, E)`, `key (Tk, Hkv, E)`, `value (Tk, Hkv, Ev)`, or pages
      `(pages, page_size, Hkv, E)` with `block_table`; `cu_seq_q`, `cu_seq_k` int32 of length B + 1;
    * `scale` is a number, `alibi_slopes` of `lse_dtype`, and no size among B, Hq, Sq, Sk is zero;
    * every tensor lies in memory as the caller has it, lengths, pages, slopes and sinks too: read each by its strides,
      or make it `contiguous()`.

    Attributes:
        query: the queries.
        key: the keys.
        value: the values.
        attn_mask: boolean, True takes part; or floating, added to the logits; or None.
        dropout: `dropout_p` of the call.
        is_causal: query `i` sees keys `j <= i + off`.
        enable_gqa: whether `Hq` may be a multiple of `Hkv`; a kernel looks at the shapes.
        scale: factor of the logits.
        causal_variant: alignment of causal masks, windows and ALiBi distances.
        window_size: `(left, right)`; -1 leaves a side open.
        softcap: 0 is off.
        sinks: `(Hq,)` or None.
        alibi_slopes: `(Hq,)` or `(B, Hq)` or None.
        seqused_k: int32 `(B,)` or None.
        return_lse: whether the caller wants `lse`.
        cu_seq_q: of a call of variable length; None in a dense one.
        cu_seq_k: likewise.
        max_q: the longest sequence of queries.
        max_k: the longest sequence of keys.
        block_table: int32 `(B, blocks)` or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | MaybeNone = None
    dropout: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    scale: float | MaybeNone = field(default=None, kw_only=True)
    causal_variant: CausalVariant = field(default=CausalVariant.UPPER_LEFT, kw_only=True)
    window_size: tuple[int, int] = field(default=OPEN_WINDOW, kw_only=True)
    softcap: float = field(default=0.0, kw_only=True)
    sinks: Tensor | MaybeNone = field(default=None, kw_only=True)
    alibi_slopes: Tensor | MaybeNone = field(default=None, kw_only=True)
    seqused_k: Tensor | MaybeNone = field(default=None, kw_only=True)
    return_lse: bool = field(default=False, kw_only=True)
    cu_seq_q: Tensor | MaybeNone = field(default=None, kw_only=True)
    cu_seq_k: Tensor | MaybeNone = field(default=None, kw_only=True)
    max_q: int | MaybeNone = field(default=None, kw_only=True)
    max_k: int | MaybeNone = field(default=None, kw_only=True)
    block_table: Tensor | MaybeNone = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        parts = [f"{name}={value}" for name, value in self._described()]
        line = f"SDPAParams({', '.join(parts)})"
        return line if len(line) <= WIDTH else "SDPAParams(\n  " + ",\n  ".join(parts) + ",\n)"

    def _repr_html_(self) -> str:
        return html_table(("field", "value"), self._described())

    def _described(self) -> list[tuple[str, str]]:
        """Return what the call has, and of a tensor not its numbers but its dtype, shape and device."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        required = ("query", "key", "value")
        defaults = {each.name: each.default for each in fields(self)}
        return [
            (name, _shown(value))
            for name, value in given.items()
            if name in required or not (value is defaults[name] or (_is_plain(value) and value == defaults[name]))
        ]

    @property
    def is_varlen(self) -> bool:
        """Whether this is a call of `varlen_attn`."""
        return self.cu_seq_q is not None

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """The shape of `lse`: `(B, Hq, Sq)`, or `(Hq, Tq)` in a call of variable length."""
        query = self.query
        return (query.shape[1], query.shape[0]) if self.is_varlen else tuple(query.shape[:-1])

    @property
    def lse_dtype(self) -> dtype:
        """The dtype of `lse`: `torch.float64` for float64 queries, else `torch.float32`."""
        import torch

        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def needs_grad(self) -> bool:
        """Whether autograd records this call."""
        import torch

        if not torch.is_grad_enabled():
            return False
        return wants_grad(self.query, self.key, self.value, self.attn_mask, self.sinks)

    def with_positive_scale(self) -> tuple[SDPAParams, int]:
        """Return a call of the same logits whose scale is above 0, for a kernel that hides keys before it scales.

        There, a scale below 0 would turn the minus infinity of a hidden key into plus infinity, and 0 into NaN.

        Returns:
            The call, itself if its scale is above 0; and -1, 0 or 1, the factor that the query got and that its
            gradient must be multiplied by.
        """
        if self.scale > 0:
            return self, 1
        sign = -1 if self.scale < 0 else 0
        return replace(self, query=self.query * sign, scale=-self.scale or 1.0), sign
