"""Gradients of plain calls; those of each feature are checked beside the feature."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from attnplug import Feature
from attnplug.testing._call import Call, compare
from attnplug.testing._checks import check
from attnplug.testing._failure import failure
from attnplug.testing._inputs import Inputs
from attnplug.testing._subject import Subject

SHAPES = [(1, 2), (113, 70), (17, 130), (1, 64)]
LONG_SHAPES = [(384, 256), (640, 128), (1023, 1024), (2048, 2048)]


@check(gradients=True, dtypes="every")
def check_gradients(subject: Subject) -> None:
    """The gradients of query, key and value are those of the formula."""
    subject.compare(subject.call(gradients=subject.gradients))
    for queries, keys in SHAPES:
        subject.compare(subject.call(queries=queries, keys=keys, batch=1, gradients=subject.gradients))
    # Of a single key, the gradients of query and key are exactly 0, and what is left of their sums is rounding.
    subject.compare(subject.call(queries=5, keys=1, gradients=subject.gradients))


@check(gradients=True, full=True)
def check_gradients_of_long_sequences(subject: Subject) -> None:
    """Gradients stay right over thousands of queries and keys."""
    for queries, keys in LONG_SHAPES:
        subject.compare(subject.call(queries=queries, keys=keys, batch=1, heads=1, gradients=subject.gradients))


@check(gradients=True)
def check_gradients_of_rising_logits(subject: Subject) -> None:
    """Gradients use the probabilities of the whole row, not those of its last block."""
    subject.compare(subject.call(values="rising", queries=20, keys=200, gradients=subject.gradients))


@check(gradients=True)
def check_each_gradient_alone(subject: Subject) -> None:
    """A gradient is right when no other is asked for."""
    subject.compare(*(subject.call(gradients=(name,)) for name in subject.gradients))


@check(gradients=True)
def check_gradient_from_an_expanded_tensor(subject: Subject) -> None:
    """Backward reads the strides of what it starts from: the gradient of a sum has strides of 0."""
    for layout in ("expanded", "transposed"):
        call, inputs = subject.one(subject.call(gradients=subject.gradients))
        inputs.grad_out = _relaid(inputs.grad_out, layout)
        compare(subject.name, call, inputs)


def _relaid(grad: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "expanded":
        return grad[:1, :1, :1, :1].expand(grad.shape)
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


@check(Feature.LSE_GRADIENT, gradients=True)
def check_lse_gradient(subject: Subject) -> None:
    """Gradients that come through lse are added to those that come through out."""
    fields = {"gradients": subject.gradients, "lse": True, "lse_gradient": True}
    subject.compare(subject.call(**fields), subject.call(**fields, queries=17, keys=130))
    call, inputs = subject.one(subject.call(**fields))
    inputs.grad_out = torch.zeros_like(inputs.grad_out)
    compare(subject.name, call, inputs)


@check(Feature.LSE_GRADIENT, gradients=True)
def check_lse_gradient_of_blind_rows(subject: Subject) -> None:
    """A row that sees no key passes no gradient on from its lse, which is -inf."""
    for feature, mask in ((Feature.BOOLEAN_MASK, "boolean blind"), (Feature.ADDITIVE_MASK, "additive blind")):
        if subject.has(feature):
            subject.compare(subject.call(mask=mask, gradients=subject.gradients, lse=True, lse_gradient=True))


@check(Feature.LSE_GRADIENT, Feature.SINKS_GRADIENT, gradients=True)
def check_lse_gradient_of_sinks(subject: Subject) -> None:
    """A sink is part of lse, and has its share of the gradient."""
    wanted = (*subject.gradients, "sinks")
    subject.compare(subject.call(sinks=True, heads=8, gradients=wanted, lse=True, lse_gradient=True))


@check(gradients=True, dtypes="float64")
def check_gradcheck(subject: Subject) -> None:
    """Gradients agree with differences of out, by torch.autograd.gradcheck in float64."""
    call, inputs = subject.one(_small(subject))
    _numerically(subject, call, inputs, torch.autograd.gradcheck)


@check(Feature.SECOND_DERIVATIVES, gradients=True, dtypes="float64")
def check_second_derivatives(subject: Subject) -> None:
    """Second derivatives agree with differences of the gradients, by torch.autograd.gradgradcheck."""
    call, inputs = subject.one(_small(subject))
    _numerically(subject, call, inputs, torch.autograd.gradgradcheck)


def _small(subject: Subject) -> Call:
    size = subject.head_size(4)
    return subject.call(batch=1, heads=2, queries=3, keys=5, head_size=size, gradients=subject.gradients)


def _numerically(subject: Subject, call: Call, inputs: Inputs, test: Callable[..., bool]) -> None:
    import attnplug

    arguments, leaves = call.with_leaves(inputs)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        given = {**arguments, **dict(zip(leaves, tensors, strict=True))}
        return attnplug.scaled_dot_product_attention(**given, impl=subject.name)

    try:
        test(function, tuple(leaves.values()), fast_mode=True)
    except Exception as error:  # as in `failing`, but for what gradcheck prints
        raise failure(call, f"{type(error).__name__}: {without_matrices(str(error))}") from error


def without_matrices(message: str) -> str:
    """Return what gradcheck says without the Jacobians that it prints, which fill a screen."""
    return re.sub(r"\n\nThe above quantities.*?(?=\nThe max per-element|\Z)", "", message, flags=re.DOTALL)
