"""What a call needs, and what a statement of capabilities lacks of it, in words.

`Requirements` holds everything about a call that `Capabilities` can speak of; two calls with equal
requirements get equal answers, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from attnplug._call.device import architecture_name, compute_capability
from attnplug._types import Capabilities, CausalVariant, Feature, SDPAParams


@dataclass(frozen=True)
class Requirements:
    """What one call asks of a kernel."""

    device: torch.device
    dtype: str
    head_size: int | None
    features: frozenset[Feature]
    needs_grad: bool


def requirements(params: SDPAParams) -> Requirements:
    """Read the requirements off checked and normalised `params`."""
    query = params.query
    nested = query.is_nested
    return Requirements(
        device=query.device,
        dtype=str(query.dtype).removeprefix("torch."),
        head_size=None if nested else query.shape[-1],
        features=frozenset(_features(params)) if not nested else frozenset({Feature.NESTED}),
        needs_grad=params.needs_grad,
    )


def _features(params: SDPAParams) -> set[Feature]:
    query, key, value, mask = params.query, params.key, params.value, params.attn_mask
    recording = torch.is_grad_enabled()
    varlen, paged = params.cu_seq_q is not None, params.block_table is not None
    heads, kv_heads = query.shape[1 if varlen else -3], key.shape[(2 if paged else 1) if varlen else -3]
    asked = {
        Feature.BOOLEAN_MASK: mask is not None and mask.dtype == torch.bool,
        Feature.ADDITIVE_MASK: mask is not None and mask.dtype != torch.bool,
        Feature.MASK_GRADIENT: mask is not None and mask.requires_grad and recording,
        Feature.CAUSAL: params.is_causal,
        Feature.WINDOW: params.window_size != (-1, -1),
        Feature.SOFTCAP: params.softcap > 0,
        Feature.SINKS: params.sinks is not None,
        Feature.SINKS_GRADIENT: params.sinks is not None and params.sinks.requires_grad and recording,
        Feature.ALIBI: params.alibi_slopes is not None,
        Feature.DROPOUT: params.dropout > 0,
        Feature.GQA: heads != kv_heads,
        Feature.VALUE_HEAD_SIZE: value.shape[-1] != query.shape[-1],
        Feature.LSE: params.return_lse,
        Feature.SEQUSED_K: params.seqused_k is not None,
        Feature.VARLEN: varlen,
        Feature.PAGED: paged,
    }
    if is_aligned(params) and not is_square(params):
        asked[Feature.LOWER_RIGHT] = params.causal_variant == CausalVariant.LOWER_RIGHT
        asked[Feature.UPPER_LEFT] = params.causal_variant == CausalVariant.UPPER_LEFT
    return {feature for feature, wanted in asked.items() if wanted}


def is_aligned(params: SDPAParams) -> bool:
    """Whether the result depends on where the diagonal starts."""
    return params.is_causal or params.window_size != (-1, -1) or params.alibi_slopes is not None


def is_square(params: SDPAParams) -> bool:
    """Whether every sequence surely has as many keys as queries, so that both alignments agree."""
    if params.cu_seq_q is not None or params.seqused_k is not None:
        return False
    return params.query.shape[-2] == params.key.shape[-2]


def lacking(capabilities: Capabilities, call: Requirements) -> tuple[str, ...]:
    """Return each reason why `capabilities` does not cover `call`; none means that it does.

    Of several alternatives, the one for the call's device and dtype speaks.
    """
    parts = capabilities.alternatives
    here = [part for part in parts if part.devices is None or call.device.type in part.devices]
    if not here:
        devices = sorted(capabilities.devices or ())
        return (f"runs on {', '.join(devices)}; the call is on {call.device.type}",)
    fitting = [part for part in here if part.dtypes is None or call.dtype in part.dtypes]
    answers = [_lacking_one(part, call) for part in fitting or here]
    return min(answers, key=len)


def _lacking_one(part: Capabilities, call: Requirements) -> tuple[str, ...]:
    reasons: list[str] = []
    if part.dtypes is not None and call.dtype not in part.dtypes:
        reasons.append(f"does not support {call.dtype} (only {', '.join(sorted(part.dtypes))})")
    if call.head_size is not None and part.head_sizes is not None:
        reasons += _head_size(call.head_size, part.head_sizes)
    reasons += [
        f"does not support {feature.value}"
        for feature in Feature
        if feature in call.features - frozenset(part.features)
    ]
    if call.device.type == "cuda":
        reasons += _architecture(part, call.device)
    return tuple(reasons)


def _head_size(size: int, accepted: Collection[int]) -> list[str]:
    if size in accepted:
        return []
    if isinstance(accepted, range) and len(accepted):
        least, most = min(accepted), max(accepted)
        if size < least:
            return [f"head size {size} is below {least}"]
        if size > most:
            return [f"head size {size} is above {most}"]
        return [f"head size {size} is not a multiple of {abs(accepted.step)}"]
    return [f"head size {size} is not one of {', '.join(map(str, sorted(accepted)))}"]


def _architecture(part: Capabilities, device: torch.device) -> list[str]:
    if torch.version.hip is None:
        needed = part.compute_capability
        if needed is None:
            if part.architectures is None:
                return []
            return [f"needs an AMD card ({', '.join(sorted(part.architectures))})"]
        found = compute_capability(device)
        if found is None:
            return [f"needs compute capability {needed[0]}.{needed[1]} or later, and there is no such device here"]
        if found < needed:
            return [
                f"needs compute capability {needed[0]}.{needed[1]} or later, found {found[0]}.{found[1]}",
            ]
        return []
    if part.architectures is None:
        return [] if part.compute_capability is None else ["needs an NVIDIA card"]
    name = architecture_name(device)
    if any(name.startswith(wanted) for wanted in part.architectures):
        return []
    return [f"needs architecture {' or '.join(sorted(part.architectures))}, found {name or 'none'}"]
