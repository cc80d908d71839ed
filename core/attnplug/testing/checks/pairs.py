"""Features together: each pair of declared features in one call, and, in a full run, larger random sets."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

from attnplug import Feature
from attnplug.testing._call import Call
from attnplug.testing._checks import check
from attnplug.testing._compare import CheckFailure
from attnplug.testing._subject import Subject

Fields = dict[str, Any]

ASKING: dict[str, tuple[tuple[Feature, ...], Fields]] = {
    "boolean mask": ((Feature.BOOLEAN_MASK,), {"mask": "boolean"}),
    "additive mask": ((Feature.ADDITIVE_MASK,), {"mask": "additive -inf"}),
    "mask gradient": ((Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT), {"mask": "additive", "+gradients": "attn_mask"}),
    "causal": ((Feature.CAUSAL,), {"is_causal": True}),
    "upper left": ((Feature.CAUSAL, Feature.UPPER_LEFT), {"is_causal": True, "queries": 33}),
    "lower right": (
        (Feature.CAUSAL, Feature.LOWER_RIGHT),
        {"is_causal": True, "queries": 33, "causal_variant": "LOWER_RIGHT"},
    ),
    "window": ((Feature.WINDOW,), {"window_size": (9, 6)}),
    "softcap": ((Feature.SOFTCAP,), {"softcap": 1.5}),
    "sinks": ((Feature.SINKS,), {"sinks": True}),
    "sinks gradient": (
        (Feature.SINKS, Feature.SINKS_GRADIENT),
        {"sinks": True, "heads": 8, "+gradients": "sinks"},
    ),
    "alibi": ((Feature.ALIBI,), {"alibi": "h"}),
    "gqa": ((Feature.GQA,), {"heads": 8, "kv_heads": 2}),
    "value head size": ((Feature.VALUE_HEAD_SIZE,), {"value_head_size": 48}),
    "lse": ((Feature.LSE,), {"lse": True}),
    "lse gradient": ((Feature.LSE, Feature.LSE_GRADIENT), {"lse": True, "lse_gradient": True}),
    "seqused_k": ((Feature.SEQUSED_K,), {"used": (37, 11)}),
    "varlen": ((Feature.VARLEN,), {"lengths_q": (21, 40), "lengths_k": (40, 23), "causal_variant": "LOWER_RIGHT"}),
    "paged": (
        (Feature.VARLEN, Feature.PAGED),
        {"lengths_q": (21, 40), "lengths_k": (40, 23), "page_size": 16, "causal_variant": "LOWER_RIGHT"},
    ),
}
"""For each thing to ask for, the features that it takes and the fields of a call that ask for it."""

LARGEST, SETS, SEED = 6, 60, 7


@check()
def check_feature_pairs(subject: Subject) -> None:
    """Any two declared features work in one call, forward and backward."""
    asked = [name for name, (features, _) in ASKING.items() if subject.has(*features)]
    _compare_all(subject, [call for pair in combinations(asked, 2) if (call := _joined(subject, pair)) is not None])


@check(full=True)
def check_feature_sets(subject: Subject) -> None:
    """Random sets of three to six declared features work in one call, forward and backward."""
    asked = [name for name, (features, _) in ASKING.items() if subject.has(*features)]
    chance = random.Random(SEED)
    sets = [chance.sample(asked, chance.randint(3, LARGEST)) for _ in range(SETS if len(asked) > LARGEST else 0)]
    _compare_all(subject, [call for names in sets if (call := _joined(subject, names)) is not None])


def _joined(subject: Subject, names: Any) -> Call | None:
    """Return one call that asks for all of `names`, or None if they exclude each other."""
    fields: Fields = {"keys": 49, "queries": 49}
    gradients = list(subject.gradients)
    for name in names:
        for field, value in ASKING[name][1].items():
            if field == "+gradients":
                gradients.append(value)
            elif fields.get(field, value) != value and field != "queries":
                return None
            else:
                fields[field] = value
    needs_backward = any("gradient" in name for name in names)
    if (needs_backward and not subject.gradients) or ("lengths_q" in fields and "mask" in fields):
        return None
    return subject.call(**fields, gradients=tuple(dict.fromkeys(gradients)))


def _compare_all(subject: Subject, calls: list[Call]) -> None:
    """Compare every call, and report all that fail: which of them do is what tells their cause."""
    failures = []
    for call in calls:
        try:
            subject.compare(call)
        except CheckFailure as failure:
            failures.append(failure)
    if failures:
        raise CheckFailure(f"{len(failures)} of {len(calls)} combinations fail\n" + "\n".join(map(str, failures)))
