"""PyTorch's private operators, taken only if this release still has them as they are called here.

Their schemas change between releases. The comparison is made when a kernel is imported, which is when its
implementation is first chosen or activated, so that a change is a reason that names operator and release.

The plugin `efficient_cuda` compares in its own way, on purpose: there a change takes only some calls away, and is one
of the reasons of `supports`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from attnplug import PluginError, SDPAParams


def operator(schema: str) -> Any:
    """Return the operator that `schema` declares, by PyTorch's own binding for it, which is called in less time.

    Not so where it returns numbers, at whose binding a trace breaks: see `bound`.

    Raises:
        PluginError: this release has no such operator, or one that calls written for `schema` do not fit.
            Arguments that a release adds behind the others, with a default, are no change.
    """
    expected = torch._C.parse_schema(schema)
    namespace, name = expected.name.split("::")
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), expected.overload_name or "default", None)
    if found is None:
        raise PluginError(f"torch {torch.__version__} has no operator {expected.name}")
    if not _fits(found._schema, expected):
        raise PluginError(
            f"torch {torch.__version__} has another {expected.name} than the one known here: expected {expected}, "
            f"found {found._schema}"
        )
    returns_numbers = any("int" in str(result.type) for result in found._schema.returns)
    return found if returns_numbers else bound(found)


def bound(operator: Any) -> Any:
    """Return PyTorch's own binding for an operator, where it has one; it takes 1 to 2 us less for each call."""
    return getattr(torch, operator._schema.name.partition("::")[2], operator)


def with_scale(attend: Any, params: SDPAParams) -> Any:
    """Return `attend` with the scale of a call given by name, unless it is PyTorch's default: 0.2 us less to read."""
    is_default = params.scale == 1.0 / math.sqrt(params.query.shape[-1])
    return attend if is_default else partial(attend, scale=params.scale)


def _fits(found: Any, expected: Any) -> bool:
    """Whether calls written for `expected` mean the same to `found`.

    `FunctionSchema.is_backward_compatible_with` would refuse a new argument before keyword-only ones.
    """
    arguments = {argument.name: (position, argument) for position, argument in enumerate(found.arguments)}
    for position, wanted in enumerate(expected.arguments):
        at, argument = arguments.pop(wanted.name, (-1, None))
        if argument is None or str(argument.type) != str(wanted.type) or (at != position and not wanted.kwarg_only):
            return False
    added = (argument for _, argument in arguments.values())
    return all(argument.has_default_value() for argument in added) and len(found.returns) == len(expected.returns)
