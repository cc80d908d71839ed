"""Which implementation computes the blocks of a ring, and how it gives their gradients; decided before any message.

A kernel must take every kind of block that any rank has, and give an lse. With `P = exp(logits - lse)` and
`delta = sum(grad_out * out)`, `lse` and `out` over *all* keys, the gradients of a block are those of any attention
call: a backward that computes with the `out` and `lse` that it is given needs no more. One that recomputes its own
would be silently wrong, so the first time a backward is tested on a small call and compared with the formula.
Such a kernel is used through the gradient of its block's own lse, if it has one, and otherwise declined.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from math import log, prod
from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy import Expected, Outcome
from attnplug._call.facts import CallFacts
from attnplug._dispatch.resolver import Decision, refusals
from attnplug._errors import NoImplementationError
from attnplug._registry.registry import Entry
from attnplug._run.contract import DIFFERENTIABLE, BackwardInputs, KernelCall, declares, tensors_of
from attnplug._selection.selection import Selection
from attnplug._selection.state import start
from attnplug._types import Feature, SDPAParams

WAY_OUT = (
    "ring attention merges what each rank computes by lse; ulysses_attention, of the same arguments, takes any "
    "implementation"
)
_TRIED = 64
_decisions: dict[Any, Decision] = {}
_sources: dict[Any, Source | str] = {}
_numbers: list[Entry] = []


class Source(Enum):
    """What a kernel makes the gradients of a block from."""

    WHOLE = "out and lse over all keys"
    PART = "its own out and lse, and their gradients"


def choose(blocks: list[SDPAParams], selection: Selection, grad: bool) -> Decision:
    """Return the first implementation that takes all these blocks.

    Args:
        blocks: one call of each kind, which ask for lse and, if `grad`, for gradients.
        selection: who decides.
        grad: whether gradients are needed.

    Raises:
        NoImplementationError: none takes them all; lists all reasons of each.
        UnknownImplementationError: the selection names none.
    """
    registry = start()
    facts = []
    for block in blocks:
        found = CallFacts.of(block)
        assert found is not None, block
        facts.append(found)
    shapes = tuple((block.query.shape, block.key.shape, block.query.stride(), block.key.stride()) for block in blocks)
    key = (selection, registry.generation, torch.are_deterministic_algorithms_enabled(), grad, tuple(facts), shapes)
    if (kept := _decisions.get(key)) is not None:
        return kept
    refused: dict[str, tuple[str, ...]] = {}
    for entry in selection.candidates(registry):
        reasons: dict[str, None] = {}
        for block, of_block in zip(blocks, facts, strict=True):
            reasons |= dict.fromkeys(refusals(entry, of_block, block))
        if not reasons and grad and isinstance(source := source_of(entry, blocks[0]), str):
            reasons[source] = None
        if not reasons:
            if len(_decisions) >= 1024:
                _decisions.clear()
            _decisions[key] = Decision(entry, str(facts[0].device), refused)
            return _decisions[key]
        refused[entry.name] = tuple(reasons)
    raise NoImplementationError(refused, selection.exact, WAY_OUT)


def number_of(entry: Entry) -> int:
    """Return a number for an implementation, which a tensor can carry from forward to backward."""
    if entry not in _numbers:
        _numbers.append(entry)
    return _numbers.index(entry)


def entry_of(number: int) -> Entry:
    return _numbers[number]


def source_of(entry: Entry, block: SDPAParams) -> Source | str:
    """Return what a kernel makes gradients from, or the reason why it makes none."""
    query, value = block.query, block.value
    heads = (query.shape[1], block.key.shape[1])
    kind: tuple[Any, ...] = (
        entry,
        query.device,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        heads,
        block.softcap > 0,
    )
    kind = (*kind, block.is_varlen, block.dropout > 0)
    if kind not in _sources:
        _sources[kind] = _find_source(entry, block)
    return _sources[kind]


def _find_source(entry: Entry, block: SDPAParams) -> Source | str:
    kernel = entry.kernel
    partial = kernel.partial_backward is not None and block.dropout == 0
    trial, arguments = _trial(block)
    declined = kernel.refusals(trial)
    tried = not declined and (partial or kernel.backward is not None)
    if tried and _undisturbed(lambda: _uses_what_it_is_given(entry, trial, arguments), block.query.device):
        return Source.WHOLE
    if declares(entry, Feature.LSE_GRADIENT) and (kernel.backward is not None or block.dropout == 0):
        return Source.PART
    if block.dropout > 0 and kernel.backward is None:
        return "draws dropout anew whenever it is differentiated, so a ring cannot repeat what forward drew"
    if kernel.backward is None and kernel.partial_backward is None:
        return "has no backward of its own (nor partial_backward), and gives no gradient through lse"
    if declined:
        return f"declines the call of {_TRIED} positions on which its backward is tested: {'; '.join(declined)}"
    return "its backward computes out and lse anew for the keys of one rank, and it gives no gradient through lse"


def _uses_what_it_is_given(entry: Entry, params: SDPAParams, arguments: dict[str, Any]) -> bool:
    """Whether a backward that is given twice the denominator, and an out of 0, computes with them.

    All probabilities are then half of what they would be, and no mean is taken off: the gradients are those of
    `(out + stopped(grad_out * out) * lse) / 2`.
    """
    call = KernelCall.of(entry, params)
    with torch.no_grad():
        out, lse, *saved = call.forward(tensors_of(params))
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(out)
        given = BackwardInputs(tensors_of(params), (True,) * 3, grad_out, None, out * 0, lse + log(2), saved)
        grads = whole_backward(call, given)
    grad_lse = (grad_out.double() * out.double()).sum(-1) / 2
    expected = Expected(
        arguments,
        ("query", "key", "value"),
        grad_out / 2,
        grad_lse.T.contiguous() if params.is_varlen else grad_lse,
    )
    named = {name: grad for name, grad in zip(expected.gradients, grads, strict=True) if grad is not None}
    return not any(expected.mistake(Outcome(out, lse, named), name) for name in named)


def _undisturbed(function: Callable[[], Any], device: torch.device) -> Any:
    """Call a function where no mode, transform or trace is in the way: in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:

        def on_device() -> Any:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return function()

        return thread.submit(on_device).result()


def _trial(block: SDPAParams) -> tuple[SDPAParams, dict[str, Any]]:
    """Return a small call of the same kind, full, without dropout, and its arguments by name."""
    generator = torch.Generator().manual_seed(1)
    rows = slice(0, _TRIED)
    at = (rows,) if block.is_varlen else (slice(0, 1), slice(None), rows)

    def make(tensor: Tensor) -> Tensor:
        shape = tensor[at].shape
        numbers = torch.randn(prod(shape), generator=generator, device="cpu").view(shape)
        return numbers.to(tensor.device, tensor.dtype).requires_grad_()

    tensors: dict[str, Any] = {name: make(getattr(block, name)) for name in ("query", "key", "value")}
    more: dict[str, Any] = {}
    if block.is_varlen:
        for side in "qk":
            length = tensors["query" if side == "q" else "key"].shape[0]
            more[f"cu_seq_{side}"] = torch.tensor([0, length], dtype=torch.int32, device=block.query.device)
            more[f"max_{side}"] = length
    params = replace(block, **tensors, **more, is_causal=False, window_size=(-1, -1), seqused_k=None, dropout=0.0)
    named = {"scale": params.scale, "softcap": params.softcap, "enable_gqa": params.enable_gqa, **more}
    return params, {**tensors, **named}


def whole_backward(call: KernelCall, given: BackwardInputs) -> tuple[Tensor | None, ...]:
    """Return the gradients of a block's query, key and value that are wanted, from `out` and `lse` over all keys."""
    kernel, wanted = call.entry.kernel, given.wanted
    if kernel.backward is not None:
        wanted = (*wanted, *(False for _ in DIFFERENTIABLE[len(wanted) :]))
        return tuple(call.backward(given._replace(wanted=wanted))[:3])
    assert kernel.partial_backward is not None
    assert given.grad_lse is None
    return tuple(kernel.partial_backward(call.params(given.tensors), given.grad_out, given.out, given.lse))


def part_backward(
    call: KernelCall,
    tensors: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    weigh: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, ...]:
    """Return the same from the block's own result, computed once more.

    `weigh` takes its `out` and `lse` and returns their gradients.
    """
    if call.entry.kernel.backward is not None:
        out, lse, *saved = call.forward(tensors)
        return whole_backward(call, BackwardInputs(tensors, wanted, *weigh(out, lse), out, lse, saved))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3] if tensor is not None]
    with torch.enable_grad():
        out, lse, *_ = call.forward((*leaves, *tensors[3:]))
    return torch.autograd.grad((out, lse), leaves, weigh(out.detach(), lse.detach()))
