"""Kernels that several ranks run in tests of `attnplug.parallel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, ImplSpec, SDPAParams


class Opaque:
    """A kernel that nobody can look into, whose backward computes from the out and lse that it is given."""

    faults: dict[str, Callable[[], None]] = {}
    """What goes wrong, in `forward` or `backward`."""

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        self.faults.get("forward", bool)()
        return _formula(params)[:2]

    def backward(self, params: SDPAParams, grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor) -> Any:
        self.faults.get("backward", bool)()
        _, _, logits, group = _formula(params)
        query, key, value = params.query, params.key, params.value
        grad_out, key, value = grad_out.float(), key.float(), value.float()
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        weights = torch.exp(logits - lse[..., None]).nan_to_num()
        delta = (grad_out * out).sum(-1, keepdim=True)
        of_logits = weights * (grad_out @ value.mT - delta) * params.scale
        grads = of_logits @ key, of_logits.mT @ query.float(), weights.mT @ grad_out
        shape = (query.shape[0], params.key.shape[1], group, params.key.shape[2], -1)
        summed = (grads[0], *(grad.reshape(shape).sum(2) for grad in grads[1:]))
        return tuple(
            grad.to(tensor.dtype) for grad, tensor in zip(summed, (query, params.key, params.value), strict=True)
        )


class OwnStatistics(Opaque):
    """A kernel whose backward computes its own out and lse anew, and gives no gradient through lse."""

    def backward(self, params: SDPAParams, grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor) -> Any:
        own, own_lse, *_ = _formula(params)
        return super().backward(params, grad_out, grad_lse, own, own_lse)


def _formula(params: SDPAParams) -> Any:
    query, key, value = (tensor.detach().float() for tensor in (params.query, params.key, params.value))
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    logits = query @ key.mT * params.scale
    if params.is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    lse = logits.logsumexp(-1)
    out = torch.exp(logits - lse[..., None]).nan_to_num() @ value
    return out.to(params.query.dtype), lse, logits, group


class Indeterministic(Opaque):
    """Declines while PyTorch's flag of deterministic algorithms is set, which no tensor of the call shows."""

    def supports(self, params: SDPAParams) -> str:
        return "is not deterministic" if torch.are_deterministic_algorithms_enabled() else ""


class LongAlone(Opaque):
    """Declines the short call on which its backward is tested."""

    shape_dependent = True

    def supports(self, params: SDPAParams) -> str:
        return "" if params.query.shape[2] > 64 else "takes more than 64 queries"


KERNELS = {"opaque": Opaque, "own_statistics": OwnStatistics, "indeterministic": Indeterministic, "long": LongAlone}


def register(name: str) -> None:
    """Register one of the kernels above in this process, if it is not there."""
    if name not in attnplug.list_flash_attention_impls():
        capabilities = Capabilities(dtypes=("float32", "bfloat16"), features=("LSE", "GQA", "CAUSAL"))
        attnplug.register_impl(ImplSpec(name=name, kernel=KERNELS[name](), backend=None, capabilities=capabilities))
