"""Sequences of different lengths: packed, only partly used, and in pages."""

from __future__ import annotations

from typing import Any

from attnplug import Feature
from attnplug.testing._call import Call
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject

LENGTHS = [((5, 40, 17), (9, 33, 70)), ((64, 1), (64, 65))]
PAGE_SIZES = (16, 256)
"""A small one, and one that kernels which want large pages take."""
EMPTY = [((0, 7, 5), (4, 7, 0)), ((3, 0, 0, 9), (3, 0, 5, 9)), ((6, 2), (0, 0)), ((0, 0), (3, 4))]


def packed(subject: Subject, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **fields: Any) -> Call:
    """Return a variable-length call, which is always aligned to the lower right."""
    return subject.call(lengths_q=lengths_q, lengths_k=lengths_k, causal_variant="LOWER_RIGHT", **fields)


@check(Feature.VARLEN, dtypes="every")
def check_varlen(subject: Subject) -> None:
    """Each sequence attends to itself alone, and lse is (Hq, T)."""
    for lengths in LENGTHS:
        subject.compare(packed(subject, *lengths))
        if subject.has(Feature.LSE):
            subject.compare(packed(subject, *lengths, lse=True))


@check(Feature.VARLEN, gradients=True)
def check_varlen_gradients(subject: Subject) -> None:
    """Gradients stay within their sequence."""
    for lengths in (*LENGTHS, EMPTY[0]):
        subject.compare(packed(subject, *lengths, gradients=subject.gradients))


@check(Feature.VARLEN)
def check_varlen_empty_sequences(subject: Subject) -> None:
    """Sequences without queries take no place in out; those without keys give 0 and lse -inf."""
    for lengths in EMPTY:
        subject.compare(packed(subject, *lengths))
        if subject.has(Feature.LSE):
            subject.compare(packed(subject, *lengths, lse=True))


@check(Feature.VARLEN)
def check_varlen_one_token(subject: Subject) -> None:
    """Sequences of one query, or one key, as in a decoding batch."""
    subject.compare(packed(subject, (1, 1, 1, 1), (1, 5, 64, 33)), packed(subject, (9, 1, 3), (1, 1, 1)))


@check(Feature.VARLEN, Feature.CAUSAL)
def check_varlen_causal(subject: Subject) -> None:
    """Causal masks are aligned to the lower right of each sequence."""
    for lengths in (*LENGTHS, ((9, 4), (3, 20)), EMPTY[0]):
        subject.compare(packed(subject, *lengths, is_causal=True))
    if subject.gradients:
        subject.compare(packed(subject, *LENGTHS[0], is_causal=True, gradients=subject.gradients))


@check(Feature.VARLEN, Feature.WINDOW)
def check_varlen_window(subject: Subject) -> None:
    """Windows are aligned to the lower right of each sequence."""
    for window in ((6, 2), (6, 0), (-1, 2), (6, -1)):
        subject.compare(*(packed(subject, *lengths, window_size=window) for lengths in (LENGTHS[0], ((9, 4), (3, 20)))))


@check(Feature.VARLEN, Feature.ALIBI)
def check_varlen_alibi(subject: Subject) -> None:
    """ALiBi distances are counted from the lower right of each sequence."""
    subject.compare(packed(subject, *LENGTHS[0], alibi="h"), packed(subject, *LENGTHS[0], alibi="bh"))


@check(Feature.VARLEN, Feature.GQA)
def check_varlen_gqa(subject: Subject) -> None:
    """Packed query heads read the key/value head of their group."""
    subject.compare(packed(subject, *LENGTHS[0], heads=6, kv_heads=2))


@check(Feature.SEQUSED_K)
def check_seqused_k(subject: Subject) -> None:
    """Only the first seqused_k keys of each sequence of a dense batch exist; none at all is possible."""
    for used in ((40, 7), (1, 33), (0, 16)):
        subject.compare(subject.call(used=used))
        if subject.has(Feature.LSE):
            subject.compare(subject.call(used=used, lse=True))
    if subject.gradients:
        subject.compare(subject.call(used=(9, 31), gradients=subject.gradients))


@check(Feature.SEQUSED_K, Feature.CAUSAL, Feature.LOWER_RIGHT)
def check_seqused_k_lower_right(subject: Subject) -> None:
    """A lower-right diagonal ends at the last used key, not at the last key."""
    fields: dict[str, Any] = {"used": (37, 12), "causal_variant": "LOWER_RIGHT", "queries": 20}
    subject.compare(subject.call(is_causal=True, **fields))
    if subject.has(Feature.WINDOW):
        subject.compare(subject.call(window_size=(5, 2), **fields))


@check(Feature.SEQUSED_K, Feature.VARLEN)
def check_varlen_seqused_k(subject: Subject) -> None:
    """Only the first seqused_k keys of each packed sequence exist."""
    fields: dict[str, Any] = {"used": (9, 12, 0)}
    subject.compare(packed(subject, *LENGTHS[0], **fields))
    if subject.has(Feature.CAUSAL):
        subject.compare(packed(subject, *LENGTHS[0], is_causal=True, **fields))


@check(Feature.PAGED)
def check_paged(subject: Subject) -> None:
    """Keys and values are read from the pages that the block table names, in its order."""
    for page_size, lengths in ((16, LENGTHS[1]), (64, LENGTHS[0]), *((size, LENGTHS[0]) for size in PAGE_SIZES)):
        subject.compare(packed(subject, *lengths, page_size=page_size))
    for page_size in PAGE_SIZES:
        subject.compare(packed(subject, *EMPTY[0], page_size=page_size))
        if subject.has(Feature.CAUSAL):
            subject.compare(packed(subject, *LENGTHS[0], page_size=page_size, is_causal=True))


@check(Feature.PAGED, Feature.SEQUSED_K)
def check_paged_seqused_k(subject: Subject) -> None:
    """A cache that is only partly filled: seqused_k says how much of the pages exists."""
    for page_size in PAGE_SIZES:
        subject.compare(packed(subject, (1, 1, 4), (40, 64, 33), page_size=page_size, used=(17, 64, 5)))


@check(Feature.PAGED, gradients=True, may_decline=True)
def check_paged_gradients(subject: Subject) -> None:
    """Gradients go to the pages that were read, and are 0 in all others."""
    subject.compare(packed(subject, *LENGTHS[0], page_size=16, gradients=subject.gradients))
