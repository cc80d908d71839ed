"""How tensors lie in memory, what may be read and written, and what must be left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug import Feature
from attnplug._accuracy import Outcome
from attnplug.testing._call import Call, compare, run
from attnplug.testing._checks import check
from attnplug.testing._failure import failure
from attnplug.testing._inputs import NAN
from attnplug.testing._memory import GuardedAllocator, Snapshot
from attnplug.testing._subject import Subject
from attnplug.testing.checks.varlen import LENGTHS, PAGE_SIZES, packed

ODD: dict[str, Any] = {"queries": 21, "keys": 37}
BEHIND = 3
ROW = ("strided", "offset", "misaligned")
TABLE = ("strided", "column-major", "framed", "misaligned", "expanded")
"""How lengths and other numbers in one dimension lie, and those in two."""


def _laid(subject: Subject, layout: str, **fields: Any) -> None:
    subject.compare(subject.call(layout=layout, gradients=subject.gradients, **{**ODD, **fields}))


@check(may_decline=True)
def check_transposed_inputs(subject: Subject) -> None:
    """Inputs whose heads lie inside positions, as a projection leaves them, give the same."""
    _laid(subject, "transposed")
    if subject.has(Feature.GQA):
        _laid(subject, "transposed", heads=4, kv_heads=2)


@check(may_decline=True)
def check_strided_inputs(subject: Subject) -> None:
    """Inputs whose head size is not dense in memory, or is the slow dimension, give the same."""
    _laid(subject, "strided")
    _laid(subject, "column-major")


@check(may_decline=True)
def check_expanded_inputs(subject: Subject) -> None:
    """Inputs with strides of 0 give what their copies give."""
    _laid(subject, "expanded")


@check(may_decline=True)
def check_offset_inputs(subject: Subject) -> None:
    """Inputs that do not start where their memory starts are read from where they start."""
    _laid(subject, "offset")


@check(may_decline=True)
def check_misaligned_inputs(subject: Subject) -> None:
    """Inputs that start at an odd element give the same, or are declined."""
    _laid(subject, "misaligned")


@check(Feature.ADDITIVE_MASK, may_decline=True)
def check_strided_masks(subject: Subject) -> None:
    """A mask is read by its strides."""
    for layout in ("column-major", "transposed", "strided", "offset"):
        _laid(subject, "contiguous", mask="additive", mask_layout=layout)


@check(Feature.BOOLEAN_MASK, may_decline=True)
def check_strided_boolean_masks(subject: Subject) -> None:
    """A boolean mask is read by its strides."""
    for layout in ("column-major", "transposed", "strided", "offset"):
        _laid(subject, "contiguous", mask="boolean", mask_layout=layout)


def _numbered(subject: Subject, layouts: Sequence[str], *calls: Call) -> None:
    """Compare each call with lengths, pages, sinks and slopes in each layout."""
    subject.compare(*(call.but(numbers_layout=layout) for layout in layouts for call in calls))


@check(Feature.VARLEN, may_decline=True)
def check_strided_varlen_lengths(subject: Subject) -> None:
    """cu_seq_q and cu_seq_k are read by their strides, from wherever they start."""
    _numbered(subject, ROW, packed(subject, *LENGTHS[0], gradients=subject.gradients))


@check(Feature.SEQUSED_K, may_decline=True)
def check_strided_seqused_k(subject: Subject) -> None:
    """seqused_k is read by its stride, 0 if all sequences have one length, from wherever it starts."""
    _numbered(subject, (*ROW, "expanded"), subject.call(used=(7, 33), gradients=subject.gradients, **ODD))
    if subject.has(Feature.VARLEN):
        _numbered(subject, (*ROW, "expanded"), packed(subject, *LENGTHS[0], used=(9, 12, 50)))


@check(Feature.PAGED, may_decline=True)
def check_strided_block_tables(subject: Subject) -> None:
    """A block table is read by its strides: it may be part of a wider one, and all sequences may share one row."""
    _numbered(subject, TABLE, *(packed(subject, *LENGTHS[0], page_size=size) for size in PAGE_SIZES))


@check(Feature.SINKS, may_decline=True)
def check_strided_sinks(subject: Subject) -> None:
    """Sinks are read by their stride, 0 if all heads share one, from wherever they start."""
    extra = ("sinks",) * (bool(subject.gradients) and subject.has(Feature.SINKS_GRADIENT))
    call = subject.call(sinks=True, heads=8, queries=9, gradients=(*subject.gradients, *extra))
    _numbered(subject, (*ROW, "expanded"), call)


@check(Feature.ALIBI, may_decline=True)
def check_strided_alibi_slopes(subject: Subject) -> None:
    """Slopes are read by their strides, 0 if all heads or sequences share them, from wherever they start."""
    call = subject.call(heads=4, gradients=subject.gradients, **ODD)
    _numbered(subject, ("strided", "expanded"), call.but(alibi="h"))
    _numbered(subject, TABLE, call.but(alibi="bh"))


@check(may_decline=True)
def check_nothing_outside_is_read(subject: Subject) -> None:
    """NaN in front of, behind and between the rows of the inputs never reaches a result or a gradient."""
    for layout in ("guarded", "framed"):
        for fields in (ODD, {"queries": 65, "keys": 17}, {"queries": 1, "keys": 129}):
            _laid(subject, layout, **fields, batch=1)


@check(Feature.SEQUSED_K)
def check_unused_keys_are_not_felt(subject: Subject) -> None:
    """NaN in the keys and values past seqused_k never reaches a result or a gradient."""
    subject.compare(subject.call(used=(7, 33), poison=True), subject.call(used=(1, 0), poison=True, keys=70))
    if subject.gradients:
        subject.compare(subject.call(used=(7, 33), poison=True, gradients=subject.gradients))
    if subject.has(Feature.VARLEN):
        subject.compare(packed(subject, *LENGTHS[0], used=(3, 33, 50), poison=True))


@check(Feature.PAGED)
def check_unused_pages_are_not_felt(subject: Subject) -> None:
    """NaN in pages of nobody, and past the last key of a page, never reaches a result."""
    for size in PAGE_SIZES:
        subject.compare(*(packed(subject, *lengths, page_size=size, poison=True) for lengths in LENGTHS))
        if subject.has(Feature.SEQUSED_K):
            subject.compare(packed(subject, *LENGTHS[0], page_size=size, used=(3, 33, 50), poison=True))


@check(Feature.VARLEN)
def check_tokens_of_no_sequence(subject: Subject) -> None:
    """Packed tokens behind the last sequence are not read, whatever they hold, and give 0 and, of lse, -inf."""
    fields: list[dict[str, Any]] = [{"gradients": subject.gradients}]
    if subject.has(Feature.LSE):
        fields.append({"lse": True, "gradients": subject.gradients})
    if subject.gradients and subject.has(Feature.SINKS_GRADIENT):
        fields.append({"sinks": True, "gradients": (*subject.gradients, "sinks")})
    for call, inputs in subject.taken([packed(subject, (5, 17), (33, 20), **each) for each in fields]):
        longer = {name: _and_behind(inputs.arguments[name], NAN) for name in ("query", "key", "value")}
        padded = replace(inputs, arguments={**inputs.arguments, **longer}, grad_out=_and_behind(inputs.grad_out, 1.0))
        found = run(subject.name, call, padded)
        for name in [name for name in found.names if name != "sinks"]:
            behind = found[name].exp()[:, -BEHIND:] if name == "lse" else found[name][-BEHIND:]
            if behind.count_nonzero():
                raise failure(
                    call, f"{name} of tokens behind the last sequence is not {'-inf' if name == 'lse' else 0}"
                )
        lse = None if found.lse is None else found.lse[:, :-BEHIND]
        gradients = {name: grad if name == "sinks" else grad[:-BEHIND] for name, grad in found.gradients.items()}
        compare(subject.name, call, inputs, Outcome(found.out[:-BEHIND], lse, gradients))


def _and_behind(tensor: Tensor, filler: float) -> Tensor:
    return torch.cat([tensor, tensor.new_full((BEHIND, *tensor.shape[1:]), filler)])


def _calls(subject: Subject) -> list[Call]:
    """Calls that reach different stores: forward, gradients, and, where declared, packed sequences."""
    lse = subject.has(Feature.LSE)
    calls = [subject.call(**ODD, lse=lse, gradients=subject.gradients), subject.call(queries=1, keys=70)]
    if subject.has(Feature.VARLEN):
        calls.append(packed(subject, (5, 0, 17), (9, 33, 0), lse=lse, gradients=subject.gradients))
    if subject.has(Feature.LOWER_RIGHT, Feature.CAUSAL):
        calls.append(subject.call(queries=90, keys=20, is_causal=True, causal_variant="LOWER_RIGHT", lse=lse))
    if subject.has(Feature.SEQUSED_K):
        calls.append(subject.call(used=(0, 9), gradients=subject.gradients))
    return calls


@check(may_decline=True)  # new memory is filled in deterministic mode, which not every kernel has
def check_outputs_are_fully_written(subject: Subject) -> None:
    """Every element of out, lse and the gradients is written: new memory full of NaN leaves no trace."""
    for call in _calls(subject):
        inputs = call.make()
        with GuardedAllocator():
            if not subject.takes(call, inputs):
                continue
            outcome = run(subject.name, call, inputs)
        compare(subject.name, call, inputs, outcome)


@check(may_decline=True)
def check_nothing_outside_is_written(subject: Subject) -> None:
    """Nothing is written before or after a tensor that the kernel allocates."""
    for call in _calls(subject):
        inputs = call.make()
        with GuardedAllocator() as allocator:
            if not subject.takes(call, inputs):
                continue
            run(subject.name, call, inputs)
        if allocator.overrun():
            raise failure(call, "memory next to a tensor that the kernel allocated was written")


@check()
def check_inputs_are_unchanged(subject: Subject) -> None:
    """Forward and backward leave their inputs as they were, and the memory around them."""
    fields: dict[str, Any] = {"layout": "guarded", "mask_layout": "guarded", "gradients": subject.gradients, **ODD}
    calls = [subject.call(**fields), subject.call(**fields, scale=0.3)]
    for feature, extra in _EXTRAS.items():
        if subject.has(feature):
            calls.append(subject.call(**fields, **extra))
    if subject.has(Feature.VARLEN):
        calls.append(packed(subject, *LENGTHS[0], layout="guarded", gradients=subject.gradients))
    for call, inputs in subject.taken(calls):
        snapshot = Snapshot({**inputs.arguments, "the gradient of out": inputs.grad_out})
        run(subject.name, call, inputs)
        for name, itself in snapshot.changed():
            raise failure(call, f"{name if itself else 'memory next to ' + name} was written to")


_EXTRAS: dict[Feature, dict[str, Any]] = {
    Feature.BOOLEAN_MASK: {"mask": "boolean"},
    Feature.ADDITIVE_MASK: {"mask": "additive"},
    Feature.SINKS: {"sinks": True},
    Feature.ALIBI: {"alibi": "h"},
    Feature.SEQUSED_K: {"used": (9, 31)},
    Feature.DROPOUT: {"dropout_p": 0.2},
}
