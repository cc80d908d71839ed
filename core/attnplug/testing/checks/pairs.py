"""Features together: any two declared ones in a call and, in a full run, any three."""

from __future__ import annotations

import random
from collections.abc import Hashable
from functools import lru_cache
from itertools import combinations
from typing import Any

from attnplug import Feature
from attnplug.testing._call import Call
from attnplug.testing._checks import check
from attnplug.testing._failure import CheckFailure
from attnplug.testing._subject import Subject

Fields = dict[str, Any]
Names = tuple[str, ...]

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
    "left window": ((Feature.WINDOW,), {"window_size": (9, 0)}),
    "softcap": ((Feature.SOFTCAP,), {"softcap": 1.5}),
    "sinks": ((Feature.SINKS,), {"sinks": True}),
    "sinks gradient": (
        (Feature.SINKS, Feature.SINKS_GRADIENT),
        {"sinks": True, "heads": 8, "+gradients": "sinks"},
    ),
    "dropout": ((Feature.DROPOUT,), {"dropout_p": 0.25, "values": "identity", "scale": 0.02}),
    "alibi": ((Feature.ALIBI,), {"alibi": "h"}),
    "gqa": ((Feature.GQA,), {"heads": 8, "kv_heads": 4}),
    "value head size": ((Feature.VALUE_HEAD_SIZE,), {"value_head_size": 56}),
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

LARGEST, SEED, SHOWN = 6, 7, 8
SHORT, LONG = {"queries": 49, "keys": 49}, {"queries": 145, "keys": 177}


@check(pieces=24)
def check_feature_pairs(subject: Subject) -> None:
    """Any two declared features work in one call, forward and backward."""
    pairs = _pairs(subject)
    _compare_all(subject, pairs if subject.full else _covering(subject, pairs, 2), SHORT)


@check(full=True, pieces=24)
def check_feature_triples(subject: Subject) -> None:
    """Any three declared features, or two that go with no third, work in one call of several tiles, both ways."""
    pairs = _pairs(subject)
    triples = _covering(subject, pairs, 3)
    held = {frozenset(pair) for names in triples for pair in combinations(names, 2)}
    _compare_all(subject, triples + [pair for pair in pairs if frozenset(pair) not in held], LONG)


def _pairs(subject: Subject) -> list[Names]:
    """Return the pairs of declared features that do not exclude each other."""
    declared = [name for name, (features, _) in ASKING.items() if subject.has(*features)]
    pairs: list[Names] = list(combinations(declared, 2))
    return [pair for pair in pairs if _joined(subject, pair, SHORT) is not None]


def _covering(subject: Subject, pairs: list[Names], size: int) -> list[Names]:
    """Return sets of names that together hold each two, or three, that go together: a call asks for a whole set.

    Pairs that are taken without gradients only have sets of their own, and a pair that is declined is one.
    """
    groups: dict[Hashable, list[Names]] = {}
    for pair in pairs:
        call = _asking(subject, pair, SHORT)
        groups.setdefault(pair if subject.refusals(call) else bool(call.gradients), []).append(pair)
    return [names for group in groups.values() for names in _cliques(tuple(group), size)]


@lru_cache(maxsize=32)  # some seconds for three of many; the pieces of a check ask for the same
def _cliques(pairs: tuple[Names, ...], size: int) -> list[Names]:
    """Return sets of at most LARGEST names, any two of them one of `pairs`, that hold all such of `size`; greedily."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    possible = {frozenset(pair) for pair in pairs}
    parts = map(frozenset, combinations(names, size))
    left = {part: None for part in parts if possible.issuperset(map(frozenset, combinations(part, 2)))}
    chance = random.Random(SEED)
    sets = []
    while left:
        chosen = sorted(next(iter(left)))
        while len(chosen) < LARGEST:
            chance.shuffle(names)
            gains = {
                name: sum(frozenset((name, *others)) in left for others in combinations(chosen, size - 1))
                for name in names
                if possible.issuperset(frozenset((name, other)) for other in chosen)
            }
            best = max(gains, key=lambda name: gains[name], default="")
            if not gains.get(best):
                break
            chosen.append(best)
        left = {part: None for part in left if not part.issubset(chosen)}
        sets.append(tuple(chosen))
    return sets


def _joined(subject: Subject, names: Names, lengths: Fields) -> Call | None:
    """Return one call that asks for all of `names`, or None if they exclude each other."""
    fields: Fields = dict(lengths)
    if "dropout" in names:  # what is dropped shows in a value that is wider than the keys are many
        fields = {**SHORT, "head_size": subject.head_size(64)}
    gradients = list(subject.gradients)
    for name in names:
        for field, value in ASKING[name][1].items():
            if field == "+gradients":
                gradients.append(value)
            elif fields.get(field, value) != value and field != "queries":
                return None
            else:
                fields[field] = value
    if "dropout" in names and fields.get("value_head_size", fields["head_size"]) < fields["keys"]:
        return None
    if (_needs_backward(names) and not subject.gradients) or ("lengths_q" in fields and "mask" in fields):
        return None
    return subject.form(subject.call(**fields, gradients=tuple(dict.fromkeys(gradients))))


def _needs_backward(names: Names) -> bool:
    return any("gradient" in name for name in names)


def _asking(subject: Subject, names: Names, lengths: Fields) -> Call:
    """Return the call for names that do not exclude each other, without gradients if it is declined with them."""
    call = _joined(subject, names, lengths)
    assert call is not None
    return call.but(gradients=()) if not _needs_backward(names) and subject.refusals(call) else call


def _compare_all(subject: Subject, sets: list[Names], lengths: Fields) -> None:
    """Compare a call for each set and, where one fails or is declined, one for each pair in it.

    All failures are reported, of pairs rather than of the sets that they are in: which of them fail is what
    tells their cause.
    """
    failures: dict[Names, CheckFailure] = {}
    tried: set[Names] = set()
    for names in subject.share(sets):
        tried.add(names)
        result = _compared(subject, names, lengths)
        if result is True:
            continue
        for pair in combinations(names, 2):
            if pair not in tried and isinstance(found := _compared(subject, pair, lengths), CheckFailure):
                failures[pair] = found
            tried.add(pair)
        if isinstance(result, CheckFailure) and not any({*pair} <= {*names} for pair in failures):
            failures[names] = result
    if failures:
        told = [f"{' and '.join(names)}: {failure}" for names, failure in list(failures.items())[:SHOWN]]
        rest = "; ".join(" and ".join(names) for names in list(failures)[SHOWN:])
        raise CheckFailure(
            "\n".join([f"{len(failures)} combinations of features fail", *told, *([rest] if rest else [])])
        )


def _compared(subject: Subject, names: Names, lengths: Fields) -> CheckFailure | bool:
    """Return what is wrong with a call that asks for `names`, or whether it was taken, and is right."""
    ran = subject.ran
    try:
        subject.compare(_asking(subject, names, lengths))
    except CheckFailure as failure:
        return failure
    return subject.ran > ran
