"""`sage_attention`: SageAttention, which rounds queries and keys to 8 bits.

Written for 1.0.6, pure Triton, which PyPI has, and for 2.0 to 2.2, which are built from source
(`sageattention/core.py` of both). Tensors are `(B, H, S, E)`, as here. Both take any keyword and ignore what they do
not know, a mask among them, so nothing is passed that is not in their signature. The first version would subtract
the keys' mean from the caller's own tensor, so that is done here. For packed sequences, `(T, H, E)`, both have a
function without an lse, whose causal mask is for as many queries as keys in each sequence: lengths that are known on
the GPU alone.

Keys are read in blocks of 64. Up to August 2025 the Triton kernels without a causal mask (all kernels of version 1;
those for packed sequences and for compute capability 8.6 of version 2) did not hide the keys that the last block
lacks, and counted each as a key of logit 0 and value 0 (`qk` in `attn_qk_int8_per_block.py` and
`attn_qk_int8_block_varlen.py`; mended by SageAttention's commit 3917283). Out is then too small by their share of the
probability. The logits' mean is 0, once the keys' is, so by Jensen's inequality that share is at most theirs among all
keys. An H100 showed it (1.0.6, Triton 3.6), and Triton's interpreter shows the same numbers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnplug import Feature, SDPAParams, bind_cuda_context, compute_capability
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter, differences

GPUS_OF_2 = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
"""What `sageattn` of version 2 has a kernel for; it raises for others."""
BLOCK = 64
LET_PASS = 0.01
"""How much of out may be missing: a fifth of what kernels that quantize are allowed, of which 8 bits take a quarter."""


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


class Hiding:
    """What came to version 2 right after kernels that hide the keys that a block lacks, and tells that it has them."""

    @staticmethod
    def sageattn_qk_int8_pv_fp16_triton(q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any: ...


class SageAttention(Adapter):
    """The kernel, on a module that has one of these functions."""

    interfaces: ClassVar[tuple[type, ...]] = (Version2, Version1)

    @cached_property
    def _release(self) -> str:
        try:
            return f"{self.name} {version(self.name)}"
        except PackageNotFoundError:
            return f"this build of {self.name}"

    @cached_property
    def _hides(self) -> bool:
        """Whether keys that the last block lacks are hidden by every kernel, as far as this can be told."""
        return self.interface is Version2 and not differences(self.library, Hiding)

    @property
    def shape_dependent(self) -> bool:
        """Whether lengths count: in a release that counts the keys that a block lacks."""
        return not self.unavailable() and not self._hides

    @cached_property
    def _packs(self) -> tuple[str, ...]:
        return differences(self.library, Packed)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
        """Return that packed sequences need a later version, where they do: how long each is only the GPU knows."""
        if self.unavailable() or self._hides:
            return {}
        return {Feature.VARLEN: f"{self._release} {_COUNTS} {BLOCK} in packed sequences{_MENDED}"}

    def supports(self, params: SDPAParams) -> list[str]:
        """Return what the GPU or the installed version rules out."""
        gpu = compute_capability(params.query.device)
        reasons: list[str] = []
        if params.is_varlen:
            reasons += self._packs
            if params.return_lse:
                reasons.append("gives no lse of packed sequences")
        reasons += self._of_missing_keys(params, gpu)
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

    def _of_missing_keys(self, params: SDPAParams, gpu: tuple[int, int] | None) -> list[str]:
        """Return that too much of out would be missing, where nothing takes it out."""
        counting = not self._hides and (self.interface is Version1 or gpu in (None, (8, 6)))
        missing = _missing_keys(params)
        if not counting or not missing or (self.interface is Version1 and _spare_column(params)):
            return []
        keys = params.key.shape[-2]
        share = missing / (keys + missing)
        if share <= LET_PASS and not params.return_lse:
            return []
        size = params.value.shape[-1]
        return [f"{self._release} {_COUNTS} {BLOCK}: {missing} beside {keys}, for head size {size}{_MENDED}"]

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor | None]:
        """Return `out` and, if it is asked for, `lse`."""
        params, _ = params.with_positive_scale()
        if self.interface is Version1 and not params.is_varlen:
            return self._version1(params), None
        query, key, value = (
            convert.aligned(convert.padded(tensor, _padded_size(params)))
            for tensor in (params.query, params.key, params.value)
        )
        if params.is_varlen:
            return self._packed(params, query, key, value), None
        options = {"is_causal": params.is_causal, "sm_scale": params.scale, "return_lse": params.return_lse}
        bind_cuda_context()
        with _current_device_kept(query):
            found = self.library.sageattn(query, key, value, tensor_layout="HND", **options)
        out, lse = found if params.return_lse else (found, None)
        return convert.first(out, params.value.shape[-1]), None if lse is None else lse.float()

    def _version1(self, params: SDPAParams) -> Tensor:
        """Return out, divided by what existing keys have of the probability, which a spare column of ones shows."""
        size, padded, missing = params.value.shape[-1], _padded_size(params), _missing_keys(params)
        key, value = params.key - params.key.mean(2, keepdim=True), params.value
        counted = missing > 0 and _spare_column(params)
        if counted:
            key, value = pad(key, (0, 0, 0, missing)), pad(value, (0, 1), value=1.0)
            value = pad(value, (0, padded - size - 1, 0, missing))
        query, key, value = (convert.aligned(convert.padded(tensor, padded)) for tensor in (params.query, key, value))
        with _current_device_kept(query):
            out: Tensor = self.library.sageattn(
                query,
                key,
                value,
                tensor_layout="HND",
                is_causal=params.is_causal,
                sm_scale=params.scale,
                smooth_k=False,
            )
        found = convert.first(out, size)
        return found / out.narrow(-1, size, 1) if counted else found

    def _packed(self, params: SDPAParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return out of packed sequences; the mean of all keys is subtracted, so those of no sequence become 0."""
        queries, keys = (
            convert.outside(starts, tensor.shape[0]).view(-1, 1, 1)
            for starts, tensor in ((params.cu_seq_q, query), (params.cu_seq_k, key))
        )
        bind_cuda_context()
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


_COUNTS = "counts the keys that are missing from the last block of"
_MENDED = "; version 2, built from source since 2025-08-05, hides them"


def _padded_size(params: SDPAParams) -> int:
    """Return the head size of the kernel that runs: 64 or 128."""
    return convert.rounded_up(max(params.query.shape[-1], 64), 64)


def _spare_column(params: SDPAParams) -> bool:
    """Whether values are padded, so that a column of theirs can show what becomes of ones."""
    return _padded_size(params) > params.value.shape[-1]


def _missing_keys(params: SDPAParams) -> int:
    """Return how many keys the last block of a dense call lacks; a causal mask hides them."""
    return 0 if params.is_causal or params.is_varlen else -params.key.shape[-2] % BLOCK


def _current_device_kept(tensor: Tensor) -> AbstractContextManager[Any]:
    """Undo that the library makes the tensor's device the process's current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


kernel = SageAttention("sageattention")
