"""Wrong arithmetic: products and sums of less precision than the inputs' dtype asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import Kernel, Sequence


def tf32(tensor: Tensor) -> Tensor:
    """Round float32 numbers to TF32's ten bits of mantissa, as tensor cores read them."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@wrong("check_values", "check_gradients")
class TensorFloat32Scores(Kernel):
    """Multiplies queries and keys in TF32, unasked."""

    def products(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        index = self.kv_heads(one.query.shape[0], one.key.shape[0])
        return tf32(one.query) @ tf32(one.key[index, start:stop]).mT * self.scale(params)


@wrong("check_values")
class TensorFloat32Values(Kernel):
    """Multiplies weights and values in TF32, unasked."""

    def weighted_values(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        index = self.kv_heads(one.query.shape[0], one.key.shape[0])
        return tf32(weights) @ tf32(one.value[index, start:stop])


@wrong("check_gradients")
class TensorFloat32Gradients(Kernel):
    """Multiplies in TF32 in backward only."""

    def scaled_gradient(self, params: SDPAParams, grad_logits: Tensor) -> Tensor:
        return tf32(super().scaled_gradient(params, grad_logits))


@wrong("check_long_sums", dtype="float16")
class HalfPrecisionAccumulator(Kernel):
    """Accumulates what it sums over keys in float16, block by block."""

    def next_sum(self, summed: Tensor, rescale: Tensor, added: Tensor) -> Tensor:
        return super().next_sum(summed, rescale, added).half().float()


@wrong("check_long_sums", dtype="float16")
class HalfPrecisionTotal(Kernel):
    """Sums weights in float16, block by block."""

    def next_total(self, total: Tensor, rescale: Tensor, weights: Tensor) -> Tensor:
        return super().next_total(total, rescale, weights).half().float()


@wrong("check_long_sums", dtype="float16")
class HalfPrecisionKeyGradient(Kernel):
    """Accumulates the gradients of key and value over queries in float16, block by block."""

    def attend_backward(self, params: SDPAParams, one: Sequence, grad_out: Tensor, out: Tensor, *lses: Any) -> Any:
        found = super().attend_backward(params, one, grad_out, out, *lses)
        total = torch.zeros_like(found["value"])
        for start in range(0, grad_out.shape[1], 32):
            part = torch.zeros_like(grad_out)
            part[:, start : start + 32] = grad_out[:, start : start + 32]
            step = super().attend_backward(params, one, part, out, *lses)["value"]
            total = (total + step).half().float()
        return {**found, "value": total}


@wrong("check_values", "check_long_sums")
class HalfPrecisionTotalOfFloat32(HalfPrecisionTotal):
    """Sums weights of float32 inputs in float16."""
