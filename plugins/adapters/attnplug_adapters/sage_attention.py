"""`sage_attention`: SageAttention, which rounds queries and keys to 8 bits.

Written for 1.0.6, pure Triton, which PyPI has, and for 2.0 to 2.2, which are built from source
(`sageattention/core.py` of both). Tensors are `(B, H, S, E)`, as here. Both take any keyword and ignore what they do
not know, a mask among them, so nothing is passed that is not in their signature. The first version subtracts
the keys' mean from the caller's own tensor. For packed sequences, `(T, H, E)`, both have a function without an lse,
whose causal mask is for as many queries as keys in each sequence: lengths that are known on the GPU alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams, compute_capability
from attnplug_adapters import contexts, convert
from attnplug_adapters.library import Adapter, differences

GPUS_OF_2 = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
"""What `sageattn` of version 2 has a kernel for; it raises for others."""


class Version2:
    """What is called of `sageattention` 2."""

    @staticmethod
    def sageattn(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: Any = "HND",
        is_causal: Any = False,
        sm_scale: Any = None,
        return_lse: Any = False,
    ) -> Any: ...


class Version1:
    """What is called of `sageattention` 1."""

    @staticmethod
    def sageattn(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: Any = "HND",
        is_causal: Any = False,
        sm_scale: Any = None,
        smooth_k: Any = True,
    ) -> Any: ...


class Packed:
    """What is called of both for packed sequences; builds of the Hub may leave it out."""

    @staticmethod
    def sageattn_varlen(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        is_causal: Any = False,
        sm_scale: Any = None,
        smooth_k: Any = True,
    ) -> Any: ...


class SageAttention(Adapter):
    """The kernel, on a module that has one of these functions."""

    interfaces: ClassVar[tuple[type, ...]] = (Version2, Version1)

    @cached_property
    def _packs(self) -> tuple[str, ...]:
        return differences(self.library, Packed)

    def supports(self, params: SDPAParams) -> list[str]:
        """Return what the GPU or the installed version rules out."""
        gpu = compute_capability(params.query.device)
        reasons: list[str] = []
        if params.is_varlen:
            reasons += self._packs
            if params.return_lse:
                reasons.append("gives no lse of packed sequences")
        if self.interface is Version2:
            if gpu is not None and gpu not in GPUS_OF_2:
                known = ", ".join(f"{major}.{minor}" for major, minor in GPUS_OF_2)
                reasons.append(f"has kernels for compute capability {known}, found {gpu[0]}.{gpu[1]}")
            return reasons
        if gpu is not None and gpu[0] > 9:
            reasons.append(f"version 1 is for compute capability 8.x and 9.x, found {gpu[0]}.{gpu[1]}")
        if params.return_lse and not params.is_varlen:
            reasons.append("version 1 gives no lse; versions from 2.0 on, built from source, do")
        return reasons

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor | None]:
        """Return `out` and, if it is asked for, `lse`."""
        params, _ = convert.positive_scale(params)
        size = convert.rounded_up(max(params.query.shape[-1], 64), 64)
        query, key, value = (
            convert.aligned(convert.padded(tensor, size)) for tensor in (params.query, params.key, params.value)
        )
        if params.is_varlen:
            return self._packed(params, query, key, value), None
        options: dict[str, Any] = {"tensor_layout": "HND", "is_causal": params.is_causal, "sm_scale": params.scale}
        if self.interface is Version2:
            options["return_lse"] = params.return_lse
        else:
            key = key.clone()
        contexts.bind()
        with _current_device_kept(query):
            found = self.library.sageattn(query, key, value, **options)
        out, lse = found if params.return_lse else (found, None)
        return convert.first(out, params.value.shape[-1]), None if lse is None else lse.float()

    def _packed(self, params: SDPAParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return out of packed sequences; the mean of all keys is subtracted, so those of no sequence become 0."""
        queries, keys = (
            convert.outside(starts, tensor.shape[0]).view(-1, 1, 1)
            for starts, tensor in ((params.cu_seq_q, query), (params.cu_seq_k, key))
        )
        contexts.bind()
        with _current_device_kept(query):
            out = self.library.sageattn_varlen(
                query,
                key.masked_fill(keys, 0.0),
                value,
                params.cu_seq_q.contiguous(),
                params.cu_seq_k.contiguous(),
                params.max_q,
                params.max_k,
                sm_scale=params.scale,
            )
        return convert.first(out, params.value.shape[-1]).masked_fill(queries, 0.0)


def _current_device_kept(tensor: Tensor) -> AbstractContextManager[Any]:
    """Undo that the library makes the tensor's device the process's current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


kernel = SageAttention("sageattention")
