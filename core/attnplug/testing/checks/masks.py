"""attn_mask, boolean and additive, in every form that broadcasts, and rows that see nothing."""

from __future__ import annotations

from attnplug import Feature
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject

FORMS = ("bhqk", "1hqk", "b1qk", "11qk", "b11k", "111k", "1h1k", "bhq1", "11q1", "hqk", "qk", "1k", "k")


@check(Feature.BOOLEAN_MASK)
def check_boolean_mask(subject: Subject) -> None:
    """A boolean mask hides the keys where it is False."""
    subject.compare(subject.call(mask="boolean"), subject.call(mask="boolean", queries=37, keys=71))
    subject.compare(subject.call(mask="boolean", keys=200, lse=subject.has(Feature.LSE)))


@check(Feature.BOOLEAN_MASK)
def check_boolean_mask_broadcasts(subject: Subject) -> None:
    """A boolean mask of any shape that PyTorch broadcasts means its expanded form."""
    for dims in FORMS:
        subject.compare(subject.call(mask="boolean", mask_dims=dims, batch=3, heads=2, queries=9, keys=13))


@check(Feature.ADDITIVE_MASK, dtypes="every")
def check_additive_mask(subject: Subject) -> None:
    """A floating mask is added to the scaled logits, in the query's dtype or in float32."""
    subject.compare(subject.call(mask="additive"), subject.call(mask="additive", queries=37, keys=71, scale=0.5))
    subject.compare(subject.call(mask="additive", mask_dtype="float32"))
    subject.compare(subject.call(mask="additive", keys=200, lse=subject.has(Feature.LSE)))


@check(Feature.ADDITIVE_MASK)
def check_additive_mask_broadcasts(subject: Subject) -> None:
    """A floating mask of any shape that PyTorch broadcasts means its expanded form."""
    for dims in FORMS:
        subject.compare(subject.call(mask="additive", mask_dims=dims, batch=3, heads=2, queries=9, keys=13))


@check(Feature.ADDITIVE_MASK)
def check_additive_minus_infinity(subject: Subject) -> None:
    """-inf in a floating mask hides a key, and no gradient of it is NaN."""
    subject.compare(subject.call(mask="additive -inf", keys=140, lse=subject.has(Feature.LSE)))
    if subject.gradients:
        subject.compare(subject.call(mask="additive -inf", gradients=subject.gradients))


@check(Feature.BOOLEAN_MASK)
def check_rows_hidden_by_a_boolean_mask(subject: Subject) -> None:
    """A row that a boolean mask hides has out 0, lse -inf, and gradients 0."""
    _blind(subject, mask="boolean blind")


@check(Feature.ADDITIVE_MASK)
def check_rows_hidden_by_an_additive_mask(subject: Subject) -> None:
    """A row whose mask is -inf throughout has out 0, lse -inf, and gradients 0."""
    _blind(subject, mask="additive blind")


@check(Feature.CAUSAL, Feature.LOWER_RIGHT)
def check_rows_before_the_first_key(subject: Subject) -> None:
    """Queries that stand before the first key, under a lower-right diagonal, see nothing: 0, -inf, and no NaN."""
    _blind(subject, is_causal=True, causal_variant="LOWER_RIGHT", queries=90, keys=20)


@check(Feature.WINDOW, Feature.UPPER_LEFT)
def check_rows_past_the_window(subject: Subject) -> None:
    """Queries whose window has left the last key see nothing: out 0, lse -inf, and no NaN."""
    _blind(subject, window_size=(8, 0), queries=90, keys=20)


@check(Feature.WINDOW, Feature.LOWER_RIGHT)
def check_rows_before_the_window(subject: Subject) -> None:
    """Queries whose window has not reached the first key see nothing: out 0, lse -inf, and no NaN."""
    for window in ((3, 8), (3, 0)):
        _blind(subject, window_size=window, causal_variant="LOWER_RIGHT", queries=90, keys=20)


def _blind(subject: Subject, **fields: object) -> None:
    lse = subject.has(Feature.LSE)
    subject.compare(subject.call(**fields), subject.call(**{**fields, "values": "negative"}))
    if lse:
        subject.compare(subject.call(**fields, lse=True))
    if subject.gradients:
        subject.compare(subject.call(**fields, gradients=subject.gradients))


@check(Feature.MASK_GRADIENT, gradients=True)
def check_mask_gradient(subject: Subject) -> None:
    """The gradient of a floating mask is that of the logits, 0 where it hides."""
    wanted = (*subject.gradients, "attn_mask")
    for mask in ("additive", "additive -inf", "additive blind"):
        subject.compare(subject.call(mask=mask, queries=20, keys=70, gradients=wanted))
    subject.compare(subject.call(mask="additive", gradients=("attn_mask",)))


@check(Feature.MASK_GRADIENT, gradients=True)
def check_mask_gradient_is_summed(subject: Subject) -> None:
    """The gradient of a mask that broadcasts is summed over every dimension that it broadcasts."""
    for dims in FORMS:
        wanted = (*subject.gradients, "attn_mask")
        subject.compare(subject.call(mask="additive", mask_dims=dims, batch=3, queries=9, keys=13, gradients=wanted))
