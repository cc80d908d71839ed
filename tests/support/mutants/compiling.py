"""Wrong only where a graph is made of the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import Kernel


@wrong("check_compile", "check_export")
class LooksAtNumbers(Kernel):
    """Says that it is made of operators that can be traced, and branches on a tensor's numbers."""

    composite = True

    def scale(self, params: SDPAParams) -> float:
        return params.scale if bool((params.query == params.query).all()) else 0.0


@wrong("check_fake_tensors", "check_operator")
class FakeHasTheWrongShape(Kernel):
    """Its fake kernel takes the head size of value for that of query, and the dtype of lse for out's."""

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        return params.query.new_empty((*params.query.shape[:-1], 7)), params.query.new_empty(params.query.shape[:-1])


@wrong("check_operator")
class FakeHasTheWrongStrides(Kernel):
    """Returns out with heads inside positions, while its fake kernel says that it is contiguous."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        out, *rest = super().forward(params)
        return (out.transpose(1, 2).contiguous().transpose(1, 2) if out.dim() == 4 else out, *rest)

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if params.query.dtype == torch.float64 else torch.float32
        rows = params.query.shape[:-1]
        return params.query.new_empty((*rows, params.value.shape[-1])), params.query.new_empty(rows, dtype=dtype)


@wrong("check_compile_with_inductor")
class FakeRemembersLengths(Kernel):
    """Its fake kernel keeps the shape of the first call that was traced."""

    def __init__(self) -> None:
        self.rows: tuple[int, ...] = ()

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if params.query.dtype == torch.float64 else torch.float32
        self.rows = self.rows or tuple(map(int, params.query.shape[:-1]))
        empty = params.query.new_empty
        return empty((*self.rows, params.value.shape[-1])), empty(self.rows, dtype=dtype)
