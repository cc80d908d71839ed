"""The attention calls of a program, seen while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from attnplug._call.prepare import prepare_dense
from attnplug._control.patch import patch_torch
from attnplug._errors import ScopeError
from attnplug._selection.watching import RecordedCall, Watcher, add_watcher, remove_watcher
from attnplug._types import CausalVariant, SDPAParams
from attnplug.bench._captured import Cases
from attnplug.bench._cases import DTYPES, Case


class capture:
    """Collect the distinct attention calls of this thread, with how often each was made.

    Calls of attnplug's functions and of `torch.nn.functional.scaled_dot_product_attention`, in unmodified models too;
    in training with the gradients that they need, in `generate` with each length. Compiled functions run as if they
    were not compiled meanwhile, so that their calls are seen. What runs, and what comes of it, is what it would be
    otherwise.

    What no case describes is counted in `left_out` of the result, with the reason.

    Raises:
        ScopeError: the block is entered twice.

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
        self._stack = ExitStack()
        self._stack.enter_context(patch_torch())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._watcher = _Watcher()
        add_watcher(self._watcher)
        return self._watcher.cases

    def __exit__(self, *exception: object) -> None:
        if self._watcher is None:
            raise ScopeError("capture() is left, but it was not entered")
        remove_watcher(self._watcher)
        self._watcher = None
        self._stack.close()

    def __del__(self) -> None:
        """Leave what nobody can leave any more: a block that was interrupted while it was being left."""
        if self._watcher is not None:
            self.__exit__()


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
    query, mask, sinks = params.query, params.attn_mask, params.sinks
    recording = torch.is_grad_enabled()
    reasons = {
        "of variable length (varlen_attn)": params.is_varlen,
        "with nested tensors": query.is_nested,
        "with seqused_k": params.seqused_k is not None,
        "that drop everything": params.dropout == 1.0,
        "that want the gradient of attn_mask": recording and isinstance(mask, Tensor) and mask.requires_grad,
        "that want the gradient of sinks": recording and sinks is not None and sinks.requires_grad,
        f"in {query.dtype}": str(query.dtype).removeprefix("torch.") not in DTYPES,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def case_of(params: SDPAParams) -> Case:
    """Return the case that a dense call is."""
    prepared: Any = prepare_dense(params)[0]
    batch, heads, queries, head_size = prepared.query.shape
    _, kv_heads, keys, value_head_size = prepared.value.shape
    mask = prepared.attn_mask
    offset = prepared.causal_variant if queries != keys else CausalVariant.UPPER_LEFT  # where it makes a difference
    return Case(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_size=head_size,
        value_head_size=value_head_size,
        causal=prepared.is_causal,
        causal_variant=CausalVariant(offset).name,
        mask="" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
        window=prepared.window_size,
        softcap=prepared.softcap,
        sinks=prepared.sinks is not None,
        alibi=prepared.alibi_slopes is not None,
        dropout=prepared.dropout,
        lse=prepared.return_lse,
        dtype=str(prepared.query.dtype).removeprefix("torch."),
        device=prepared.query.device.type,
        backward=params.needs_grad,
    )
