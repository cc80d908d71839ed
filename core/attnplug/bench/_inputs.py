"""The tensors of a case, made on its device, and the calls on them that are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import CausalVariant
from attnplug.bench._cases import Case

_SEED = 20
_HIDDEN = 0.3


@dataclass(frozen=True)
class Problem:
    """A case with its tensors, the same for every implementation.

    Attributes:
        arguments: of `attnplug.scaled_dot_product_attention`, or of `varlen_attn` where the case is one of it.
        grad_out: what backward starts from.
    """

    case: Case
    arguments: dict[str, Any]
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients are measured."""
        return tuple(self.arguments[name] for name in self.case.leaves)

    def forward(self, impl: str, **changes: Any) -> Tensor:
        """Run an implementation; where the case has backward, with all that backward needs kept."""
        return self.forward_with_lse(impl, **changes)[0]

    def forward_with_lse(self, impl: str, **changes: Any) -> tuple[Tensor, Tensor | None]:
        """Do the same; return the logsumexp too, where the case asks for it. `changes` are to the arguments."""
        function = attnplug.varlen_attn if self.case.is_varlen else attnplug.scaled_dot_product_attention
        with torch.set_grad_enabled(self.case.backward):
            found = function(**{**self.arguments, **changes}, impl=impl)
        return found if isinstance(found, tuple) else (found, None)

    def backward(self, out: Tensor, grad_out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves; it may be called again."""
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
        if self.case.is_varlen:
            given["causal_variant"] = CausalVariant.LOWER_RIGHT
        return attnplug.SDPAParams(dropout=given.pop("dropout_p"), **given)


def make(case: Case) -> Problem:
    """Make the tensors: standard normal numbers, the same ones each time on one kind of device."""
    generator = torch.Generator(case.device).manual_seed(_SEED)

    def normal(*shape: int, needs_grad: bool = False) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=case.device)
        return made.requires_grad_(needs_grad)

    def seen(*shape: int) -> Tensor:  # three tenths of the keys are hidden, never the first
        kept = torch.rand(shape, generator=generator, device=case.device) >= _HIDDEN
        kept[..., 0] = True
        return kept

    arguments = _arguments(case, normal, seen)
    return Problem(case, arguments, normal(*_rows(case), case.value_head_size))


def empty_params(case: Case) -> attnplug.SDPAParams:
    """Return the call of a case as the record that selection reads, with tensors that take no memory."""

    def empty(*shape: int, needs_grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=case.torch_dtype, device="meta", requires_grad=needs_grad)

    arguments = _arguments(case.but(device="meta"), empty, lambda *shape: empty(*shape).bool())
    return Problem(case, arguments, empty()).params()


def _rows(case: Case) -> tuple[int, ...]:
    return (case.rows, case.heads) if case.is_varlen else (case.batch, case.heads, case.queries)


def _arguments(case: Case, normal: Callable[..., Tensor], seen: Callable[..., Tensor]) -> dict[str, Any]:
    """Return all arguments, with numbers that `normal` makes, and a mask of booleans that `seen` does."""
    if case.is_varlen:
        places: tuple[int, ...] = (case.key_rows,) if case.page_size is None else (_pages(case), case.page_size)
        places = (*places, case.kv_heads)
    else:
        places = (case.batch, case.kv_heads, case.keys)
    arguments: dict[str, Any] = {
        "query": normal(*_rows(case), case.head_size, needs_grad=case.backward),
        "key": normal(*places, case.head_size, needs_grad=case.backward),
        "value": normal(*places, case.value_head_size, needs_grad=case.backward),
        "is_causal": case.causal,
        "window_size": case.window,
        "enable_gqa": case.heads != case.kv_heads,
        "softcap": case.softcap,
        "dropout_p": case.dropout,
        "return_lse": case.lse,
    }
    if case.sinks:
        wide = torch.float64 if case.dtype == "float64" else torch.float32
        arguments["sinks"] = normal(case.heads).to(wide).requires_grad_(case.sinks_gradient)
    if case.alibi:
        arguments["alibi_slopes"] = normal(case.heads).abs().float()
    if case.mask:
        shape = case.mask_shape
        is_boolean = case.mask == "boolean"
        arguments["attn_mask"] = seen(*shape) if is_boolean else normal(*shape, needs_grad=case.mask_gradient)
    if case.used is not None:
        arguments["seqused_k"] = _integers(case, case.used)
    return arguments | (_sequences(case) if case.is_varlen else {"causal_variant": CausalVariant[case.causal_variant]})


def _sequences(case: Case) -> dict[str, Any]:
    """Return where the sequences are, and the pages of their keys, in an order that no two neighbours keep."""
    assert case.lengths_q is not None
    assert case.lengths_k is not None
    given: dict[str, Any] = {
        "cu_seq_q": _integers(case, accumulate(case.lengths_q, initial=0)),
        "cu_seq_k": _integers(case, accumulate(case.lengths_k, initial=0)),
        "max_q": case.queries,
        "max_k": case.keys,
    }
    if case.page_size is not None:
        order = torch.randperm(_pages(case), generator=torch.Generator().manual_seed(_SEED))
        given["block_table"] = order.reshape(case.batch, -1).to(case.device, torch.int32)
    return given


def _pages(case: Case) -> int:
    """Return how many pages there are, as many for each sequence."""
    assert case.page_size is not None
    return case.batch * -(-case.keys // case.page_size)


def _integers(case: Case, numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=case.device)
