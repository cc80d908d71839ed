"""One compiled function for each kind of call, in which sizes alone vary.

`torch.compile(flex_attention)` holds all kernels of a process to one limit, Dynamo's `recompile_limit` of 8 for a
function; beyond it, flex_attention computes without a kernel, the scores of all queries and keys in memory. So what a
kernel is compiled for (dtype, heads, what the call asks, a size of 1) chooses a function here, and each function is
compiled once for all sizes on a CPU; elsewhere, where kernels gain from sizes that they know, for the sizes that it
sees first, and once more for all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnplug_adapters.flex_mods import is_constant

Attend = Callable[[Tensor, Tensor, Tensor, Any, BlockMask | None], Any]

MOST = 256
"""How many kinds are compiled, as many as Dynamo compiles of one function in all (`accumulated_recompile_limit`)."""

_compiled: dict[Hashable, Attend] = {}


def attention(scale: float, enable_gqa: bool, wants_lse: bool) -> Attend:
    """Return flex_attention with these constants, which computes without a kernel unless it is compiled."""

    def attend(query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: BlockMask | None) -> Any:
        aux = AuxRequest(lse=True) if wants_lse else None
        return flex_attention(query, key, value, score_mod, block_mask, scale, enable_gqa, return_aux=aux)

    return attend


def attend(
    constants: tuple[float, bool, bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: BlockMask | None,
) -> Any:
    """Return what `attention(*constants)` does, computed by a compiled kernel; if that cannot be, it warns."""
    given = (query, key, value, score_mod, block_mask)
    function = _function_of(constants, given)
    if function is None:
        reason = f"it has compiled kernels for {MOST} kinds of calls, and this is another"
    else:
        try:
            return function(*given)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            reason = f"Dynamo compiles no more kernels for this kind of call ({error.__cause__ or error})"
    warnings.warn(
        f"flex computes a call without a kernel, with the scores of all queries and keys in memory: {reason}. "
        f"attnplug.explain says what else takes it",
        RuntimeWarning,
        stacklevel=2,
    )
    return attention(*constants)(*given)


def _function_of(
    constants: tuple[float, bool, bool], given: tuple[Tensor, Tensor, Tensor, Any, BlockMask | None]
) -> Attend | None:
    """Return the function for calls of this kind; None if there are too many kinds."""
    *tensors, score_mod, block_mask = given
    kind = (
        constants,
        torch.is_grad_enabled(),
        *((tensor.device, tensor.shape[1], tensor.shape[3], _form(tensor)) for tensor in tensors),
        _form_of_closure(score_mod),
        None if block_mask is None else (_form(block_mask.kv_indices), _form_of_closure(block_mask.mask_mod)),
    )
    found = _compiled.get(kind)
    if found is None and len(_compiled) < MOST:
        made = attention(*constants)
        assert isinstance(made, FunctionType)
        # Dynamo counts by code object, and keeps which sizes have varied by name.
        made.__code__ = made.__code__.replace(co_name=f"flex_attention_of_kind_{len(_compiled)}")
        varying = True if given[0].device.type == "cpu" else None
        found = _compiled.setdefault(kind, torch.compile(made, fullgraph=True, dynamic=varying))
    return found


def _form(tensor: Tensor) -> Hashable:
    """Return what else than a size of 2 or more a kernel is compiled for."""
    ones = tuple(size == 1 for size in tensor.shape)
    return tensor.dtype, tensor.requires_grad, ones, tensor.is_contiguous()


def _form_of_closure(what: Any) -> Hashable:
    """Return what a kernel is compiled for, of a function and all that it closes over."""
    if isinstance(what, FunctionType):
        return what.__code__, *(_form_of_closure(cell.cell_contents) for cell in what.__closure__ or ())
    if isinstance(what, Tensor):
        repeats = tuple(stride == 0 for stride in what.stride())
        return _form(what), what.shape if is_constant(what.device) else None, repeats
    return what
