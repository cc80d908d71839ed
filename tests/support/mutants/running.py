"""Wrong only now and then: order of sums, threads, memory of earlier calls; and what is declared but declined."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import Kernel


@wrong("check_deterministic", "check_deterministic_algorithms")
class SumsInAnyOrder(Kernel):
    """Adds the gradients of a group in the order in which they arrive, as atomic additions do."""

    def summed_over_group(self, gradient: Tensor, kv_heads: int) -> Tensor:
        group = gradient.unflatten(0, (kv_heads, gradient.shape[0] // kv_heads))
        noise = 1 + (random.random() - 0.5) * 1e-6
        return group.sum(1) * noise


@wrong("check_deterministic")
class RefusesDeterminism(Kernel):
    """Declares that repeated runs give equal bits, and raises when PyTorch insists on it."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("has no deterministic implementation")
        return super().forward(params)


@wrong("check_deterministic_algorithms")
class FasterWhenAskedForDeterminism(SumsInAnyOrder):
    """Reads the flag the wrong way round: adds in the order of arrival only where equal bits are asked for."""

    def summed_over_group(self, gradient: Tensor, kv_heads: int) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            return super().summed_over_group(gradient, kv_heads)
        return Kernel.summed_over_group(self, gradient, kv_heads)


@wrong("check_two_threads_at_once")
class SharedWorkspace(Kernel):
    """Keeps what it works on in one place for all threads."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        self.current = params
        time.sleep(1e-3)
        query = self.current.query
        if query.shape != params.query.shape:
            out, *rest = super().forward(params)
            return (out + query.flatten()[0], *rest)
        return super().forward(params)


@wrong("check_calls_do_not_depend_on_earlier_calls")
class RemembersShapes(Kernel):
    """Keeps a sum of weights per shape and does not clear it."""

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        out, *rest = super().forward(params)
        shape = (params.query.shape, params.key.shape, params.query.dtype)
        return (out + 0 * out + (out - self.kept.setdefault(shape, out)) * 0.01, *rest)


@wrong("check_calls_that_repeat_another")
class PreparesWithoutTheScale(Kernel):
    """Prepares for calls that repeat another, and forgets the scale."""

    def prepare(self, params: SDPAParams) -> Any:
        return lambda *tensors: self.forward(SDPAParams(*tensors, is_causal=params.is_causal, scale=0.125))


@wrong("check_calls_that_repeat_another")
class PreparesWithTheFirstTensors(Kernel):
    """Prepares for calls that repeat another, and reads the keys where those of the first call lie."""

    def prepare(self, params: SDPAParams) -> Any:
        key = params.key
        return lambda query, _, value: self.forward(replace(params, query=query, key=key, value=value))


@wrong("check_calls_that_repeat_another")
class PreparesWithTheFirstLengths(Kernel):
    """Prepares for packed sequences that repeat others, and takes them to be as long as those."""

    def prepare_packed(self, params: SDPAParams) -> Any:
        return lambda query, key, value, *lengths: self.forward(replace(params, query=query, key=key, value=value))


@wrong("check_calls_that_repeat_another")
class PreparesBackwardWithTheFirstLengths(Kernel):
    """Prepares for backward of packed sequences that repeat others, and takes them to be as long as those."""

    def prepare_packed(self, params: SDPAParams) -> Any:
        names = "query", "key", "value", "cu_seq_q", "cu_seq_k", "sinks", "alibi_slopes", "seqused_k", "block_table"
        return lambda *tensors: self.forward(replace(params, **dict(zip(names, tensors, strict=True))))

    def prepare_backward(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *saved: Any) -> Any:
        if not params.is_varlen:
            return None

        def run(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
            again = replace(params, query=query, key=key, value=value)
            grad_out, out, lse, *saved = others[6:]
            return self.backward(again, grad_out, None, out, lse, *saved)

        return run


@wrong("check_softcap")
class DeclinesSoftcap(Kernel):
    """Declares softcap, and declines every call that asks for it."""

    def supports(self, params: SDPAParams) -> str | None:
        return "softcap is not there yet" if params.softcap > 0 else None


@wrong("check_paged")
class RaisesForPages(Kernel):
    """Declares pages, and raises when they come."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        if params.block_table is not None:
            raise NotImplementedError("pages")
        return super().forward(params)


@wrong("check_values", dtype="bfloat16")
class ReturnsFloat32(Kernel):
    """Returns out in the dtype of its sums."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        out, *rest = super().forward(params)
        return (out.float(), *rest)


@wrong("check_autocast")
class HalvesBfloat16Gradients(Kernel):
    """Halves the gradients of bfloat16 calls, which autocast makes of float32 ones."""

    def backward(self, params: SDPAParams, grad_out: Tensor, *given: Any) -> tuple[Any, ...]:
        if params.query.dtype == torch.bfloat16:
            grad_out = grad_out * 0.5
        return super().backward(params, grad_out, *given)
