"""Grouped queries: which key/value head each query head reads, and where its gradients go."""

from __future__ import annotations

from attnplug import Feature
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject

GROUPS = [(4, 2), (6, 2), (6, 3), (3, 1)]


@check(Feature.GQA)
def check_gqa(subject: Subject) -> None:
    """Query head h reads key/value head h // (Hq / Hkv)."""
    for heads, kv_heads in GROUPS:
        subject.compare(subject.call(heads=heads, kv_heads=kv_heads, keys=50, lse=subject.has(Feature.LSE)))


@check(Feature.GQA, gradients=True)
def check_gqa_gradients(subject: Subject) -> None:
    """The gradient of a key/value head is the sum over the query heads that read it."""
    for heads, kv_heads in GROUPS:
        fields = {"heads": heads, "kv_heads": kv_heads, "batch": 1, "queries": 20, "keys": 50}
        subject.compare(subject.call(**fields, gradients=subject.gradients))
