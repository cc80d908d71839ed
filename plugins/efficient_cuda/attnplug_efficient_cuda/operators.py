"""PyTorch's private attention operators, and whether this release still has them as they are called here.

Schemas of private operators change between releases. They are compared when an implementation is first
chosen, so that a change is a reason that names operator and release, not an exception in the middle of a
call. Arguments that a later release appends with a default are no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams

_EXPECTED = {
    "_efficient_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "int? max_seqlen_q, int? max_seqlen_k, float dropout_p, int custom_mask_type, "
        "bool compute_log_sumexp, *, float? scale, int? window_size",
        6,
    ),
    "_efficient_attention_backward": (
        "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor logsumexp, "
        "float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, "
        "bool bias_requires_grad, *, float? scale, int? num_splits_key, int? window_size",
        4,
    ),
    "_cudnn_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? cum_seq_q, Tensor? cum_seq_k, "
        "int max_q, int max_k, bool compute_log_sumexp, float dropout_p, bool is_causal, "
        "bool return_debug_mask, *, float? scale",
        9,
    ),
    "_cudnn_attention_backward": (
        "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, "
        "int max_q, int max_k, float dropout_p, bool is_causal, *, float? scale",
        3,
    ),
    "_scaled_dot_product_efficient_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p, "
        "bool is_causal, *, float? scale",
        4,
    ),
    "_scaled_dot_product_efficient_attention_backward": (
        "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp, "
        "Tensor philox_seed, Tensor philox_offset, float dropout_p, List[bool] grad_input_mask, bool is_causal, *, "
        "float? scale",
        4,
    ),
    "_scaled_dot_product_cudnn_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p, "
        "bool is_causal, bool return_debug_mask, *, float? scale",
        9,
    ),
}


def efficient_forward(*args: Any, **kwargs: Any) -> Any:
    """Call `aten::_efficient_attention_forward`."""
    return torch.ops.aten._efficient_attention_forward.default(*args, **kwargs)


def efficient_backward(*args: Any, **kwargs: Any) -> Any:
    """Call `aten::_efficient_attention_backward`."""
    return torch.ops.aten._efficient_attention_backward.default(*args, **kwargs)


def cudnn_forward(*args: Any, **kwargs: Any) -> Any:
    """Call `aten::_cudnn_attention_forward`."""
    return torch.ops.aten._cudnn_attention_forward.default(*args, **kwargs)


def cudnn_backward(*args: Any, **kwargs: Any) -> Any:
    """Call `aten::_cudnn_attention_backward`."""
    return torch.ops.aten._cudnn_attention_backward.default(*args, **kwargs)


def bound(name: str) -> Any:
    """Return PyTorch's own binding for `aten::<name>`, None where this release has none that is called as here.

    For `_scaled_dot_product_*`, which reach the operators above with less said: 3 to 6 us less for each call.
    """
    return None if changed(name) else getattr(torch, name, None)


def overload(name: str) -> Any:
    """Return `aten::<name>` itself, None where this release has none that is called as here."""
    return None if changed(name) else getattr(torch.ops.aten, name).default


def repeated(name: str, params: SDPAParams, wants_lse: bool) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """Return what calls the operator of this name, see `bound`, for calls without a mask or dropout that repeat one."""
    attend = bound(name)
    if attend is None:
        return None
    if params.scale != 1.0 / math.sqrt(params.query.shape[-1]):
        attend = partial(attend, scale=params.scale)
    if params.is_causal:
        return lambda query, key, value: attend(query, key, value, None, wants_lse, 0.0, True)
    return lambda query, key, value: attend(query, key, value, None, wants_lse)  # each argument takes 0.2 us to read


@cache
def cudnn_lse_rank() -> int:
    """Return how many dimensions cuDNN's lse of a dense call has, which differs between releases of PyTorch."""
    query = torch.empty(1, 1, 2, 8, dtype=torch.float16, device="meta")
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, query, query, None, True)[1].dim()


def cudnn_takes_sequences() -> bool:
    """Whether cuDNN's path for sequences is the one that PyTorch's own `varlen_attn` takes.

    The operator that is looked for came with the last of its repairs, in PyTorch 2.15
    (https://github.com/pytorch/pytorch/pull/195650).
    """
    return find_schema("_cudnn_attention_forward_no_dropout_inplace") is not None


@cache
def changed(*names: str) -> tuple[str, ...]:
    """Return a reason for each of these operators that is not what this plugin was written for."""
    return tuple(reason for name in names if (reason := _difference(name, find_schema(name))))


def find_schema(name: str) -> Any:
    """Return the schema of `aten::<name>`, or None where this release has no such operator."""
    packet = getattr(torch.ops.aten, name, None)
    operator = getattr(packet, "default", None)
    return None if operator is None else operator._schema


def _difference(name: str, schema: Any) -> str:
    """Say how `schema` differs from what is called, or nothing."""
    where = f"aten::{name} of PyTorch {torch.__version__}"
    if schema is None:
        return f"{where} does not exist"
    arguments, results = _EXPECTED[name]
    positional, _, named = arguments.partition(", *, ")
    found = {argument.name: argument for argument in schema.arguments}
    for position, wanted in enumerate(positional.split(", ")):
        at = schema.arguments[position] if position < len(schema.arguments) else None
        if at is None or at.kwarg_only or _declaration(at) != wanted:
            return f"{where} has {_declaration(at)!r} as argument {position + 1}, where {wanted!r} is expected"
    for wanted in named.split(", "):
        at = found.get(wanted.split()[-1])
        if at is None or _declaration(at) != wanted:
            return f"{where} has {_declaration(at)!r}, where {wanted!r} is expected"
    known = {part.split()[-1] for part in (*positional.split(", "), *named.split(", "))}
    for argument in schema.arguments:
        if argument.name not in known and not argument.has_default_value():
            return f"{where} needs an argument that is not known here: {_declaration(argument)!r}"
    if len(schema.returns) != results:
        return f"{where} returns {len(schema.returns)} values, where {results} are expected"
    return ""


def _declaration(argument: Any) -> str:
    return "nothing" if argument is None else f"{_type_name(str(argument.real_type))} {argument.name}"


def _type_name(name: str) -> str:
    if name.startswith("Optional["):
        return f"{_type_name(name[len('Optional[') : -1])}?"
    return name
