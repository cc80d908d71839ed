"""What else changes the logits: softcap, sinks, ALiBi."""

from __future__ import annotations

from attnplug import Feature
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject


@check(Feature.SOFTCAP)
def check_softcap(subject: Subject) -> None:
    """Scaled logits become softcap * tanh(logits / softcap)."""
    lse = subject.has(Feature.LSE)
    subject.compare(*(subject.call(softcap=cap, keys=70, scale=1.0, lse=lse) for cap in (0.5, 2.0, 30.0)))


@check(Feature.SOFTCAP, gradients=True)
def check_softcap_gradients(subject: Subject) -> None:
    """Gradients carry the derivative of the cap, 1 - tanh^2."""
    subject.compare(*(subject.call(softcap=cap, scale=1.0, gradients=subject.gradients) for cap in (0.5, 5.0)))


@check(Feature.SOFTCAP, Feature.ADDITIVE_MASK)
def check_softcap_comes_before_the_mask(subject: Subject) -> None:
    """The cap is put on the products, not on the mask that is added to them."""
    subject.compare(subject.call(softcap=1.5, scale=1.0, mask="additive"))
    subject.compare(subject.call(softcap=1.5, scale=1.0, mask="additive -inf"))


@check(Feature.SOFTCAP, Feature.ALIBI)
def check_softcap_comes_before_alibi(subject: Subject) -> None:
    """The cap is put on the products, not on ALiBi's distances."""
    subject.compare(subject.call(softcap=1.5, scale=1.0, alibi="h", queries=70, keys=70))


@check(Feature.SINKS)
def check_sinks(subject: Subject) -> None:
    """A sink is one more logit in its head's denominator: out shrinks, and lse includes it."""
    lse = subject.has(Feature.LSE)
    subject.compare(
        subject.call(sinks=True, heads=4, lse=lse), subject.call(sinks=True, heads=3, keys=140, scale=0.02, lse=lse)
    )


@check(Feature.SINKS)
def check_sinks_are_not_scaled_or_shifted(subject: Subject) -> None:
    """A sink takes part in the maximum as it is: rows far below it vanish, rows far above it forget it."""
    for values in ("negative", "growing"):
        subject.compare(subject.call(sinks=True, values=values, lse=subject.has(Feature.LSE)))


@check(Feature.SINKS)
def check_sinks_of_blind_rows(subject: Subject) -> None:
    """A row that sees no key but has a sink gives out 0 and the sink itself as lse."""
    masks = {Feature.BOOLEAN_MASK: "boolean blind", Feature.ADDITIVE_MASK: "additive blind"}
    for feature, mask in masks.items():
        if subject.has(feature):
            subject.compare(subject.call(sinks=True, mask=mask, lse=subject.has(Feature.LSE)))
            if subject.gradients:
                subject.compare(subject.call(sinks=True, mask=mask, gradients=subject.gradients))


@check(Feature.SINKS, gradients=True)
def check_gradients_beside_sinks(subject: Subject) -> None:
    """The gradients of query, key and value account for the share of the sink."""
    subject.compare(subject.call(sinks=True, heads=3, gradients=subject.gradients))


@check(Feature.SINKS_GRADIENT, gradients=True)
def check_sinks_gradient(subject: Subject) -> None:
    """The gradient of a sink is the sum over sequences and queries of what its probability takes away."""
    wanted = (*subject.gradients, "sinks")
    subject.compare(subject.call(sinks=True, heads=8, queries=9, gradients=wanted))
    subject.compare(subject.call(sinks=True, batch=3, heads=8, queries=9, gradients=("sinks",)))


@check(Feature.ALIBI)
def check_alibi(subject: Subject) -> None:
    """Slope times distance is taken off the logits on both sides of the diagonal, each head by its own slope."""
    lse = subject.has(Feature.LSE)
    subject.compare(subject.call(alibi="h", heads=4, lse=lse), subject.call(alibi="h", queries=70, keys=70))


@check(Feature.ALIBI)
def check_alibi_slopes_of_each_sequence(subject: Subject) -> None:
    """Slopes of shape (B, Hq) are those of each sequence."""
    subject.compare(subject.call(alibi="bh", batch=3, heads=2))


@check(Feature.ALIBI, Feature.UPPER_LEFT)
def check_alibi_upper_left(subject: Subject) -> None:
    """With unequal lengths and UPPER_LEFT, distances are |i - j|."""
    subject.compare(*(subject.call(alibi="h", queries=q, keys=k) for q, k in ((13, 40), (70, 21))))


@check(Feature.ALIBI, Feature.LOWER_RIGHT)
def check_alibi_lower_right(subject: Subject) -> None:
    """With unequal lengths and LOWER_RIGHT, distances are |i + Sk - Sq - j|."""
    lower_right = "LOWER_RIGHT"
    subject.compare(
        *(subject.call(alibi="h", queries=q, keys=k, causal_variant=lower_right) for q, k in ((13, 40), (70, 21)))
    )


@check(Feature.ALIBI, gradients=True)
def check_alibi_gradients(subject: Subject) -> None:
    """Gradients are those of the biased probabilities."""
    subject.compare(subject.call(alibi="h", heads=3, gradients=subject.gradients))
