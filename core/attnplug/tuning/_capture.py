"""The attention calls of a program, seen while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from attnplug._call.device import name_of_dtype
from attnplug._call.prepare import prepare_dense
from attnplug._control.patch import patch_torch
from attnplug._errors import ScopeError
from attnplug._selection.watching import RecordedCall, Watcher, add_watcher, remove_watcher
from attnplug._types import DTYPES, CausalVariant, SDPAParams
from attnplug.bench._captured import Cases
from attnplug.bench._cases import Case

_IN_COMPILED_CODE = (
    "capture() is entered in compiled code; enter it around the call of that, which runs uncompiled then"
)


class capture:
    """Collect the distinct attention calls of this thread, with how often each was made.

    Calls of attnplug's functions and of `torch.nn.functional.scaled_dot_product_attention`, in unmodified models too;
    in training with the gradients that they need, in `generate` with each length. Compiled functions run as if they
    were not compiled meanwhile, so that their calls are seen. The calls run, and return, what they would
    otherwise.

    What no case describes is counted in `left_out` of the result, with the reason.

    Raises:
        ScopeError: the block is entered twice, or in compiled code.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 16, 8)
        >>> with attnplug.capture() as cases:
        ...     for _ in range(3):
        ...         _ = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        >>> print(cases)
        calls  case
        3      B1 H2 S16 D8 causal float32
    """

    _watcher: _Watcher | None = None

    def __enter__(self) -> Cases:
        if self._watcher is not None:
            raise ScopeError("this capture() is entered already; make another one")
        if is_dynamo_compiling():
            raise ScopeError(_IN_COMPILED_CODE)  # which ends the trace: the code then runs, and is told below
        self._stack = ExitStack()
        with ExitStack() as entered:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
                try:
                    entered.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:  # PyTorch refuses it below compiled code
                    raise ScopeError(_IN_COMPILED_CODE) from error
            entered.enter_context(patch_torch())
            self._watcher = _Watcher()
            add_watcher(self._watcher)
            self._stack = entered.pop_all()
        return self._watcher.cases

    def __exit__(self, *exception: object) -> None:
        if self._watcher is None:
            raise ScopeError("capture() is left, but it was not entered")
        remove_watcher(self._watcher)
        self._stack.close()
        self._watcher = None

    def __del__(self) -> None:
        """Leave a block that can no longer be left by hand, because leaving it was interrupted."""
        if self._watcher is not None:
            self.__exit__()

    def __getstate__(self) -> None:
        """Return nothing: a copy is entered by nobody."""


class _Watcher(Watcher):
    """Takes note of each call's arguments."""

    def __init__(self) -> None:
        self.cases = Cases()

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Any]) -> Any:
        if reason := _indescribable(params):
            self.cases.left_out[reason] += 1
        else:
            self.cases[case_of(params)] += 1
        return run(params)

    def told(self, call: RecordedCall) -> None:
        self.cases.left_out["made by code that was compiled inside the block; compile it before"] += 1


def _indescribable(params: SDPAParams) -> str:
    """Return what no case says; empty if one says all of a call."""
    query = params.query
    has_lengths = params.is_varlen or params.seqused_k is not None
    reasons = {
        "with nested tensors, whose sizes cannot be read without waiting for the device": query.is_nested,
        "that drop everything": params.dropout == 1.0,
        f"in {query.dtype}": name_of_dtype(query.dtype) not in DTYPES,
        "whose lengths are on a GPU that captures a graph": has_lengths and query.is_cuda and _is_capturing(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def case_of(params: SDPAParams) -> Case:
    """Return the case that a call is. Lengths of sequences are read from their device."""
    needs_grad = params.needs_grad
    params = params if params.is_varlen else prepare_dense(params)[0]
    more = _of_packed(params) if params.is_varlen else _of_dense(params)
    recording = torch.is_grad_enabled()
    mask, sinks, used = params.attn_mask, params.sinks, params.seqused_k
    return Case(
        **more,
        head_size=params.query.shape[-1],
        value_head_size=params.value.shape[-1],
        causal=params.is_causal,
        window=params.window_size,
        softcap=params.softcap,
        sinks=sinks is not None,
        alibi=params.alibi_slopes is not None,
        dropout=params.dropout,
        lse=params.return_lse,
        used=None if used is None else tuple(used.tolist()),
        dtype=name_of_dtype(params.query.dtype),
        device=params.query.device.type,
        backward=needs_grad,
        mask_gradient=recording and mask is not None and mask.requires_grad,
        sinks_gradient=recording and sinks is not None and sinks.requires_grad,
    )


def _of_dense(params: SDPAParams) -> dict[str, Any]:
    batch, heads, queries, _ = params.query.shape
    _, kv_heads, keys, _ = params.value.shape
    fields: dict[str, Any] = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "queries": queries, "keys": keys}
    if queries != keys or params.seqused_k is not None:  # else it makes no difference
        fields["causal_variant"] = CausalVariant(params.causal_variant).name
    mask = params.attn_mask
    if mask is not None:
        sizes = zip("bhqk", (batch, heads, queries, keys), mask.shape, strict=True)
        fields["mask"] = "boolean" if mask.dtype == torch.bool else "additive"
        fields["mask_dims"] = "".join(
            letter if given == full and (letter != "h" or full > 1) else "1" for letter, full, given in sizes
        )
    return fields


def _of_packed(params: SDPAParams) -> dict[str, Any]:
    lengths_q, used = params.cu_seq_q.diff().tolist(), params.seqused_k
    lengths_k = params.cu_seq_k.diff().tolist() if params.cu_seq_k is not None else used.tolist()
    return {
        "heads": params.query.shape[1],
        "kv_heads": params.key.shape[-2],
        "queries": params.max_q,
        "keys": params.max_k,
        "lengths_q": lengths_q,
        "lengths_k": lengths_k,
        "page_size": None if params.block_table is None else params.key.shape[1],
    }
