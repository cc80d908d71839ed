"""What a call needs, and what a statement of capabilities lacks of it, in words."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch

from attnplug._call.device import architecture_name, compute_capability, name_of_dtype, type_of
from attnplug._call.facts import NO_EXTENSIONS, CallFacts
from attnplug._types import OPEN_WINDOW, Capabilities, CausalVariant, Feature


@lru_cache(1024)
def features(call: CallFacts) -> frozenset[Feature]:
    """Return the features that a call asks for."""
    mask, more = call.mask, call.extensions or NO_EXTENSIONS
    if more.nested:
        return frozenset({Feature.NESTED})
    asked = [
        (Feature.BOOLEAN_MASK, mask is not None and mask.dtype == torch.bool),
        (Feature.ADDITIVE_MASK, mask is not None and mask.dtype != torch.bool),
        (Feature.MASK_GRADIENT, mask is not None and mask.wants_grad),
        (Feature.CAUSAL, call.is_causal),
        (Feature.LOWER_RIGHT, not call.square and more.causal_variant == CausalVariant.LOWER_RIGHT),
        (Feature.UPPER_LEFT, not call.square and more.causal_variant == CausalVariant.UPPER_LEFT),
        (Feature.WINDOW, more.window_size != OPEN_WINDOW),
        (Feature.SOFTCAP, more.softcap),
        (Feature.SINKS, more.sinks is not None),
        (Feature.SINKS_GRADIENT, more.sinks is not None and more.sinks.wants_grad),
        (Feature.ALIBI, more.slopes > 0),
        (Feature.DROPOUT, call.dropout),
        (Feature.GQA, call.heads != call.kv_heads),
        (Feature.VALUE_HEAD_SIZE, call.value_head_size != call.head_size),
        (Feature.LSE, more.return_lse),
        (Feature.SEQUSED_K, more.seqused),
        (Feature.VARLEN, more.varlen),
        (Feature.PAGED, more.paged),
    ]
    return frozenset([feature for feature, wanted in asked if wanted])


def needs_grad(call: CallFacts) -> bool:
    """Whether autograd records the call."""
    sinks = call.extensions.sinks if call.extensions is not None else None
    return call.recorded or any(tensor is not None and tensor.wants_grad for tensor in (call.mask, sinks))


def lacking(capabilities: Capabilities, call: CallFacts) -> tuple[str, ...]:
    """Return each reason why `capabilities` does not cover `call`; none means that it does.

    Of several alternatives, the one for the call's device and dtype speaks.
    """
    parts = capabilities.alternatives
    device = type_of(call.device)
    here = [part for part in parts if part.devices is None or device in part.devices]
    if not here:
        devices = sorted(capabilities.devices or ())
        return (f"runs on {', '.join(devices)}; the call is on {device}",)
    dtype, asked = name_of_dtype(call.dtype), features(call)
    fitting = [part for part in here if part.dtypes is None or dtype in part.dtypes]
    answers = [_lacking_one(part, call, dtype, asked) for part in fitting or here]
    return min(answers, key=len)


def _lacking_one(part: Capabilities, call: CallFacts, dtype: str, asked: frozenset[Feature]) -> tuple[str, ...]:
    reasons: list[str] = []
    if part.dtypes is not None and dtype not in part.dtypes:
        reasons.append(f"does not support {dtype} (only {', '.join(sorted(part.dtypes))})")
    if part.head_sizes is not None and Feature.NESTED not in asked:
        reasons += _head_size(call.head_size, part.head_sizes)
    if not part.dense and Feature.VARLEN not in asked:
        reasons.append("takes variable-length calls alone (varlen_attn)")
    if missing := asked.difference(part.features):
        reasons += [f"does not support {feature.value}" for feature in Feature if feature in missing]
    if type_of(call.device) == "cuda":
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
            return [f"needs an AMD GPU ({', '.join(sorted(part.architectures))})"]
        found = compute_capability(device)
        if found is None:
            return [f"needs compute capability {needed[0]}.{needed[1]} or later, and there is no such device here"]
        if found < needed:
            return [
                f"needs compute capability {needed[0]}.{needed[1]} or later, found {found[0]}.{found[1]}",
            ]
        return []
    if part.architectures is None:
        return [] if part.compute_capability is None else ["needs an NVIDIA GPU"]
    name = architecture_name(device)
    if any(name.startswith(wanted) for wanted in part.architectures):
        return []
    return [f"needs architecture {' or '.join(sorted(part.architectures))}, found {name or 'none'}"]
