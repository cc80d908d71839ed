"""Nested tensors: PyTorch's own way to write sequences of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import Feature
from attnplug._accuracy import Outcome
from attnplug.testing._call import compare
from attnplug.testing._checks import check
from attnplug.testing._failure import failing
from attnplug.testing._subject import Subject

LENGTHS = (5, 17, 9)


@check(Feature.NESTED)
def check_nested_tensors(subject: Subject) -> None:
    """Each sequence of a nested tensor (jagged layout) gives what it gives alone."""
    calls = [subject.call(batch=1, queries=length, keys=length, seed=length) for length in LENGTHS]
    alone = [(call, call.make()) for call in calls]
    nested: dict[str, Any] = {
        name: _jagged([inputs.arguments[name][0] for _, inputs in alone]) for name in ("query", "key", "value")
    }
    with failing(None, "nested tensors: "):
        out = attnplug.scaled_dot_product_attention(**nested, impl=subject.name)
    subject.ran += 1
    for (call, inputs), part in zip(alone, out.unbind(), strict=True):
        compare(subject.name, call, inputs, Outcome(part[None]))


def _jagged(parts: list[Tensor]) -> Tensor:
    """Return `(B, H, S, E)`, S jagged, of parts `(H, S, E)`."""
    nested = torch.nested.nested_tensor([part.transpose(0, 1) for part in parts], layout=torch.jagged)
    return nested.transpose(1, 2)
