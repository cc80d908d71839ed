"""Dropout, without knowing a kernel's random numbers: values that are the identity show its mask in out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug import Feature
from attnplug._accuracy import Outcome
from attnplug.testing._call import Call, compare, run
from attnplug.testing._checks import check
from attnplug.testing._failure import failure
from attnplug.testing._inputs import Inputs
from attnplug.testing._subject import Subject

P = 0.25  # cuDNN takes steps of 1/16
SEED = 1234
SIGMAS = 6.0


def revealing(subject: Subject, **fields: Any) -> Call:
    """Return a call whose out is the matrix of dropped probabilities, none of which is near 0.

    A full run asks for the largest head size, where that is not declined: its backward needs more shared memory than
    some GPUs have.
    """
    sizes = (subject.head_size(size) for size in ((256, 64) if subject.full else (64,)))
    shown = {"queries": 20, "values": "identity", "scale": 0.02, "batch": 1, "dropout_p": P}
    calls = [subject.call(**{**shown, "keys": size, "head_size": size, **fields}) for size in sizes]
    return next((call for call in calls if not subject.refusals(call)), calls[-1])


def many(subject: Subject, **fields: Any) -> Call:
    """Return the same with enough draws for statistics."""
    return revealing(subject, **{"queries": subject.head_size(64), "batch": 3, **fields})


def seeded(subject: Subject, call: Call, inputs: Inputs, seed: int = SEED) -> Outcome:
    """Run a call from a fixed state of the device's default generator."""
    torch.manual_seed(seed)
    return run(subject.name, call, inputs)


def identity(like: Tensor) -> Tensor:
    """Return a gradient of out that makes value's the transpose of the dropped probabilities, then zeros."""
    return torch.eye(*like.shape[-2:], dtype=like.dtype, device=like.device).expand_as(like)


@check(Feature.DROPOUT)
def check_dropout_scales_what_it_keeps(subject: Subject) -> None:
    """A probability is either 0 or 1 / (1 - p) times what it would be."""
    subject.compare(*(revealing(subject, dropout_p=p) for p in (P, 0.75)))


@check(Feature.DROPOUT)
def check_dropout_probability(subject: Subject) -> None:
    """The share of dropped probabilities is p, for each of several p, within six standard deviations."""
    for p in (0.125, P, 0.75):
        call, inputs = subject.one(many(subject, dropout_p=p))
        dropped = seeded(subject, call, inputs).out == 0
        share, deviation = dropped.double().mean().item(), (p * (1 - p) / dropped.numel()) ** 0.5
        if abs(share - p) > SIGMAS * deviation:
            raise failure(call, f"{share:.4f} of all probabilities are dropped, expected {p} +- {deviation:.4f}")


@check(Feature.DROPOUT)
def check_dropout_is_independent(subject: Subject) -> None:
    """Every sequence, head, query and key has its own draw."""
    call, inputs = subject.one(many(subject, heads=3))
    dropped = (seeded(subject, call, inputs).out == 0).flatten(0, 1)
    for name, rows in (
        ("sequences or heads", dropped.flatten(1)),
        ("queries", dropped.transpose(0, 1).flatten(1)),
        ("keys", dropped.permute(2, 0, 1).flatten(1)),
    ):
        agreement = _largest_agreement(rows)
        chance = P * P + (1 - P) * (1 - P)
        if agreement > chance + SIGMAS * 0.5 / rows.shape[1] ** 0.5:
            raise failure(call, f"two {name} have masks that agree in {agreement:.0%}; chance would be {chance:.0%}")


def _largest_agreement(rows: Tensor) -> float:
    signs = rows.double() * 2 - 1
    agreement = (signs @ signs.T / rows.shape[1] + 1) / 2
    return agreement.fill_diagonal_(0).max().item()


@check(Feature.DROPOUT)
def check_dropout_follows_the_seed(subject: Subject) -> None:
    """The same seed gives the same mask; another seed, and the next call, give others."""
    call, inputs = subject.one(revealing(subject))
    first = seeded(subject, call, inputs).out
    following = run(subject.name, call, inputs).out
    again = seeded(subject, call, inputs).out
    other = seeded(subject, call, inputs, SEED + 1).out
    if not torch.equal(first, again):
        raise failure(call, "two runs after the same torch.manual_seed differ")
    for what, out in (("the next call repeats the mask", following), ("another seed gives the same mask", other)):
        if torch.equal(first, out):
            raise failure(call, f"{what}: draw from PyTorch's default generator of the device")


@check(Feature.DROPOUT, gradients=True)
def check_dropout_mask_of_backward(subject: Subject) -> None:
    """Backward uses forward's mask: with the identity as its start, the gradient of value is out's transpose."""
    call, inputs = subject.one(revealing(subject, gradients=subject.gradients))
    inputs.grad_out = identity(inputs.grad_out)
    outcome = seeded(subject, call, inputs)
    kept, kept_by_backward = outcome.out != 0, outcome.gradients["value"][..., : call.queries].mT != 0
    if not torch.equal(kept, kept_by_backward):
        share = (kept != kept_by_backward).double().mean().item()
        raise failure(call, f"backward's mask differs from forward's in {share:.0%} of the probabilities")


@check(Feature.DROPOUT, gradients=True)
def check_dropout_gradients(subject: Subject) -> None:
    """Gradients are those of the formula with the mask that forward used."""
    subject.compare(revealing(subject, gradients=subject.gradients))


@check(Feature.DROPOUT, gradients=True)
def check_dropout_mask_survives_other_draws(subject: Subject) -> None:
    """Backward uses forward's mask even if the generator has moved on, or was seeded anew, in between."""
    import attnplug

    call, inputs = subject.one(revealing(subject, gradients=("value",)))
    inputs.grad_out = identity(inputs.grad_out)
    arguments, leaves = call.with_leaves(inputs)
    out = attnplug.scaled_dot_product_attention(**arguments, impl=subject.name)
    torch.manual_seed(SEED + 2)
    torch.rand(7, device=call.device)
    (gradient,) = torch.autograd.grad(out, [leaves["value"]], inputs.grad_out)
    if not torch.equal(out != 0, gradient[..., : call.queries].mT != 0):
        raise failure(call, "backward draws a mask of its own: save what forward drew")


@check(Feature.DROPOUT, Feature.LSE)
def check_dropout_leaves_lse_alone(subject: Subject) -> None:
    """Lse is that of all probabilities, before dropout."""
    subject.compare(revealing(subject, lse=True))


@check(Feature.DROPOUT)
def check_dropout_of_everything(subject: Subject) -> None:
    """With p = 1 nothing is left: out is 0, not 0 / 0."""
    call, inputs = subject.one(subject.call(dropout_p=1.0, gradients=subject.gradients))
    outcome = run(subject.name, call, inputs)
    for name, tensor in (("out", outcome.out), *outcome.gradients.items()):
        if not bool((tensor == 0).all()):
            raise failure(call, f"{name}: expected zeros, got {tensor.flatten()[0].item()} and others")


@check(Feature.DROPOUT, Feature.CAUSAL)
def check_dropout_under_a_causal_mask(subject: Subject) -> None:
    """Dropout and a causal mask: hidden keys stay hidden, the others are dropped and scaled."""
    subject.compare(revealing(subject, is_causal=True, gradients=subject.gradients))


@check(Feature.DROPOUT, Feature.GQA)
def check_dropout_of_grouped_heads(subject: Subject) -> None:
    """Query heads that share a key/value head have masks of their own, in backward too."""
    call, inputs = subject.one(revealing(subject, heads=4, kv_heads=2, gradients=subject.gradients))
    outcome = seeded(subject, call, inputs)
    kept = outcome.out != 0
    if torch.equal(kept[:, 0], kept[:, 1]):
        raise failure(call, "query heads 0 and 1 have the same mask")
    compare(subject.name, call, inputs, outcome)
