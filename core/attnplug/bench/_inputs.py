"""The tensors of a case, made on its device, and the calls on them that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import CausalVariant
from attnplug.bench._cases import Case

LEAVES = ("query", "key", "value")
_SEED = 20
_HIDDEN = 0.3


@dataclass(frozen=True)
class Problem:
    """A case with its tensors, the same for every implementation.

    Attributes:
        arguments: of `attnplug.scaled_dot_product_attention`.
        grad_out: what backward starts from.
    """

    case: Case
    arguments: dict[str, Any]
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Query, key and value."""
        return tuple(self.arguments[name] for name in LEAVES)

    def forward(self, impl: str, **changes: Any) -> Tensor:
        """Run an implementation; where the case has backward, with all that backward needs kept."""
        return self.forward_with_lse(impl, **changes)[0]

    def forward_with_lse(self, impl: str, **changes: Any) -> tuple[Tensor, Tensor | None]:
        """Do the same; return the logsumexp too, where the case asks for it. `changes` are to the arguments."""
        with torch.set_grad_enabled(self.case.backward):
            found = attnplug.scaled_dot_product_attention(**{**self.arguments, **changes}, impl=impl)
        return found if isinstance(found, tuple) else (found, None)

    def backward(self, out: Tensor, grad_out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of query, key and value; it may be called again."""
        grad_out = self.grad_out if grad_out is None else grad_out
        return torch.autograd.grad(out, self.leaves, grad_out, retain_graph=True, materialize_grads=True)

    def both(self, impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all that the case asks for, once: out, and the gradients, none if it has no backward."""
        out = self.forward(impl)
        return out, self.backward(out) if self.case.backward else ()

    def timed_forward(self, impl: str) -> Callable[[], Any]:
        """Return the call whose time is that of forward."""
        return lambda: self.forward(impl)

    def timed_backward(self, impl: str) -> Callable[[], Any]:
        """Run forward, and return the call whose time is that of backward."""
        out = self.forward(impl)
        return lambda: self.backward(out)

    def params(self) -> attnplug.SDPAParams:
        """Return the call as the record that selection reads."""
        given = dict(self.arguments)
        return attnplug.SDPAParams(dropout=given.pop("dropout_p"), **given)


def make(case: Case) -> Problem:
    """Make the tensors: standard normal numbers, the same ones each time on one kind of device."""
    generator = torch.Generator(case.device).manual_seed(_SEED)

    def normal(*shape: int, needs_grad: bool = False) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=case.device)
        return made.requires_grad_(needs_grad)

    arguments = _arguments(case, normal)
    if case.mask:
        arguments["attn_mask"] = _mask(case, generator)
    return Problem(case, arguments, normal(case.batch, case.heads, case.queries, case.value_head_size))


def empty_params(case: Case) -> attnplug.SDPAParams:
    """Return the call of a case as the record that selection reads, with tensors that take no memory."""

    def empty(*shape: int, needs_grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=case.torch_dtype, device="meta", requires_grad=needs_grad)

    arguments = _arguments(case, empty)
    if case.mask:
        mask = empty(case.batch, 1, case.queries, case.keys)
        arguments["attn_mask"] = mask.bool() if case.mask == "boolean" else mask
    return Problem(case, arguments, empty()).params()


def _arguments(case: Case, normal: Callable[..., Tensor]) -> dict[str, Any]:
    """Return all arguments but the mask, with tensors that `normal` makes."""
    arguments: dict[str, Any] = {
        "query": normal(case.batch, case.heads, case.queries, case.head_size, needs_grad=case.backward),
        "key": normal(case.batch, case.kv_heads, case.keys, case.head_size, needs_grad=case.backward),
        "value": normal(case.batch, case.kv_heads, case.keys, case.value_head_size, needs_grad=case.backward),
        "is_causal": case.causal,
        "causal_variant": CausalVariant[case.causal_variant],
        "window_size": case.window,
        "enable_gqa": case.heads != case.kv_heads,
        "softcap": case.softcap,
        "dropout_p": case.dropout,
        "return_lse": case.lse,
    }
    if case.sinks:
        wide = torch.float64 if case.dtype == "float64" else torch.float32
        arguments["sinks"] = normal(case.heads).to(wide)
    if case.alibi:
        arguments["alibi_slopes"] = normal(case.heads).abs().float()
    return arguments


def _mask(case: Case, generator: torch.Generator) -> Tensor:
    """Three tenths of the keys hidden, never the first; or normal numbers to be added."""
    shape = (case.batch, 1, case.queries, case.keys)
    if case.mask == "additive":
        return torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=case.device)
    seen = torch.rand(shape, generator=generator, device=case.device) >= _HIDDEN
    seen[..., 0] = True
    return seen
