"""The dense call. The first comparisons decide whether PyTorch's own function can simply run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import inf
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, is_grad_enabled
from torch._C._autograd import _profiler_enabled
from torch._C._nn import scaled_dot_product_attention as _torch_sdpa  # under the name that patch_torch leaves alone
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function

from attnplug._call.device import cudnn_errs
from attnplug._call.facts import NUMBERS, UPPER_LEFT, dense_sizes, fit_alike, is_open
from attnplug._call.prepare import prepare_dense, without_numpy
from attnplug._call.validate import is_sharded
from attnplug._dispatch import eager, traced
from attnplug._dispatch.plans import Plan, is_deterministic
from attnplug._dispatch.quick import ASK, PASS, PASS_IF_ALIGNED, answer
from attnplug._dispatch.ranges import is_profiled
from attnplug._dispatch.recognised import PLAIN, known, recognise
from attnplug._params import params_of
from attnplug._run.sharded import run_sharded
from attnplug._selection.state import process, start, start_outside, thread
from attnplug._selection.watching import wished
from attnplug._tracing import holds_in_trace
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalVariant as TorchVariant

LARGE = 2**22
"""Of fewer elements, and head sizes of 8 and above, no query is too large for a backward on CUDA, whatever its lengths.

See `TOO_FAR` in `builtin.faults`: one query of head size 8 counts as 128 of 32. `builtin.aten_flash` has the same as
`SMALL`, because built-in kernels keep to public names.
"""


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    causal_variant: CausalVariant | TorchVariant = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    return_lse: bool,
    impl: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_variant: CausalVariant | TorchVariant = UPPER_LEFT,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Compute attention with the implementation that the current selection chooses for this call.

    The first eight parameters are those of `torch.nn.functional.scaled_dot_product_attention`, in its
    order. `off`, below, is 0 for `UPPER_LEFT` and `Sk - Sq` for `LOWER_RIGHT`.

    Args:
        query: `(..., Hq, Sq, E)`, float16, bfloat16, float32 or float64.
        key: `(..., Hkv, Sk, E)`, of the query's dtype and device.
        value: `(..., Hkv, Sk, Ev)`, likewise.
        attn_mask: broadcasts to `(..., Hq, Sq, Sk)`; boolean, True takes part; or floating, of the
            query's dtype or float32, added to the logits. A `CausalBias` is accepted. May be combined
            with `is_causal`.
        dropout_p: probability with which a probability is zeroed; the others are scaled by
            `1 / (1 - dropout_p)`.
        is_causal: query `i` sees keys `j <= i + off`.
        scale: factor of the logits; `1 / sqrt(E)` if None.
        enable_gqa: allows `Hq` to be a multiple of `Hkv`; query head `h` reads head `h // (Hq / Hkv)`.
        causal_variant: alignment of causal masks, windows and ALiBi distances.
        window_size: `(left, right)`: query `i` sees `i + off - left <= j <= i + off + right`; -1 leaves
            a side open.
        softcap: if above 0, `logits = softcap * tanh(logits / softcap)`.
        sinks: `(Hq,)`, one more logit in each row's denominator, with no value.
        alibi_slopes: `(Hq,)` or `(B, Hq)`; `slope * |i + off - j|` is subtracted from the logits. They get no
            gradient, and are an error where one is required.
        seqused_k: `(B,)` int32; only so many keys of each sequence exist.
        return_lse: also return the natural logarithm of the softmax's denominator.
        impl: the implementation that must run; stronger than any scope or activation.

    Returns:
        `out (..., Hq, Sq, Ev)` in the query's dtype; with `return_lse`, `(out, lse)` with
        `lse (..., Hq, Sq)` in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NoImplementationError: nothing that is allowed supports the call; the message gives all reasons.
        UnknownImplementationError: `impl` names no implementation.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(2, 8, 16, 64)
        >>> attnplug.scaled_dot_product_attention(query, query, query, is_causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    # Each comparison below is a share of a tiny call's time. PyTorch's keyword arguments cost 0.8 us, so they are
    # left out where they say nothing.
    state = thread.state
    tracing = is_dynamo_compiling()
    if scale is not None and type(scale) is not float:
        scale = without_numpy(scale, tracing)
    if tracing or (not process.plain and is_compiling()):  # Dynamo, which may begin again, must find the same way
        start_outside()
    plain = False
    if (  # where the value of such a chain is kept, each link takes three bytecodes more
        sinks is None
        and alibi_slopes is None
        and seqused_k is None
        and type(softcap) is float
        and softcap == 0.0
        and ((not tracing and window_size is OPEN_WINDOW) or is_open(window_size))
        and causal_variant is UPPER_LEFT
    ):
        plain = True
    # The passthrough: where `torch` comes first, a call that PyTorch's own function can take goes straight to it. A
    # trace takes the same way: each function that it goes through costs a compiled model guards, at every call.
    passes = False
    if (
        (state.torch_first if impl is None else type(impl) is str and impl == "torch")
        and process.plain
        and plain
        and return_lse is False
        and not (state.watched or (is_profiled() if tracing else _profiler_enabled()))
        and (scale is None or (type(scale) is float and 0.0 < scale < inf))
        and type(dropout_p) in NUMBERS
        and dropout_p < 1.0
    ):
        if impl is None and process.choices is not None:  # then one look-up says whether, or which kernel runs
            quick: Any = ASK
            if state.scope is None and attn_mask is None and dropout_p == 0.0 and not tracing:
                quick = answer(query, key, value, is_causal, enable_gqa)
            if type(quick) is Plan:
                # `answer` gives no plan without a `plain`, which its type does not say.
                return quick.plain(query, key, value, None, 0.0, is_causal, scale, enable_gqa)[0]  # type: ignore[misc]
            passes = quick is PASS or (quick is PASS_IF_ALIGNED and _fit_cuda(query, key, value, dropout_p))
        elif (
            (enable_gqa is False or enable_gqa is True)
            and (type(query) in PLAIN or (isinstance(query, Tensor) and not is_sharded(query)))
            and (
                (
                    (not tracing or _are_of_four(query, key, value))
                    and dense_sizes(query, key, value, enable_gqa) is not None
                )
                or (not enable_gqa and fit_alike(query, key, value))
            )
            and (attn_mask is None or (not is_causal and _is_plain_mask(attn_mask, query)))
            and (not tracing or _agree(query, key, value, attn_mask, dropout_p))
            and (query.get_device() < 0 or _fit_cuda(query, key, value, dropout_p))
        ):
            passes = True
    if passes:
        try:
            if scale is None and not enable_gqa:
                if is_causal is False and dropout_p == 0.0:  # a number takes PyTorch 0.3 us to read
                    return _torch_sdpa(query, key, value, attn_mask)
                return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal)
            return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        except (RuntimeError, TypeError, ValueError):
            # Almost surely a mistake in the arguments: say which, or let the error be raised again.
            prepare_dense(SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, scale=scale))
            raise
    if state.watched and not is_compiling():
        impl = wished(impl)
    # The kept route's short way: a call like one before it. Some kernels need no record of the call.
    way: tuple[Any, ...] | None = None
    found = None
    if (
        not tracing
        and (plain or are_numbers(causal_variant, window_size, softcap, sinks, alibi_slopes, seqused_k))
        and (impl is not None or process.choices is None)  # measured choices look at lengths
        and (impl is None or type(impl) is str)
        and (is_causal is False or is_causal is True)
        and (enable_gqa is False or enable_gqa is True)
        and (return_lse is False or return_lse is True)
        and (scale is None or type(scale) is float)
        and type(dropout_p) in NUMBERS
    ):
        registry = process.registry or start()
        way = (
            # as `who_decides` has it, without the time of a call
            state.scope,
            impl,
            process.activation,
            registry.generation,
            is_deterministic(),
            # how the function is called
            is_causal,
            enable_gqa,
            return_lse,
            scale,
            dropout_p,
            attn_mask is None,
            is_grad_enabled(),  # which decides about gradients, and is not among what tensors are compared by
        )
        if not plain:
            way = (*way, causal_variant, window_size, softcap)
        candidates = known.get(way)
        if candidates is not None:
            found = recognise(candidates, query, key, value, attn_mask)
            if found is not None and plain and found.plain is not None and not _profiler_enabled():
                if state.watched:
                    out, lse = found.watched_plain(
                        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse
                    )
                else:
                    out, lse = found.plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
                return (out, lse) if return_lse else out
    fields: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout": dropout_p,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "scale": scale,
        "return_lse": return_lse,
    }
    if not plain:
        fields |= {
            "causal_variant": causal_variant,
            "window_size": window_size,
            "softcap": softcap,
            "sinks": sinks,
            "alibi_slopes": alibi_slopes,
            "seqused_k": seqused_k,
        }
    if found is not None:
        out, lse = found.run_as_given(params_of(fields))
        return (out, lse) if return_lse else out
    if tracing:
        return traced.or_eagerly(_the_long_way, fields, impl, way)
    return _the_long_way(fields, impl, way)


def _the_long_way(fields: dict[str, Any], impl: str | None, way: Hashable) -> Any:
    """Run a call that is not like one before it, or is traced, symbolic or sharded."""
    query, compiling = fields["query"], is_compiling()
    if type(query) not in PLAIN:
        if not compiling and is_symbolic(query):
            return to_symbols(scaled_dot_product_attention, fields, impl)
        if is_sharded(query):
            prepared, rows = prepare_dense(SDPAParams(**fields))
            out, lse = run_sharded(prepared, lambda share: (traced if compiling else eager).dense(share, impl))
            if rows != prepared.query.shape[:-1]:
                out, lse = out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)
            return (out, lse) if fields["return_lse"] else out
    if compiling:
        out, lse = traced.dense(SDPAParams(**fields), impl)
    else:
        out, lse = eager.dense(params_of(fields), impl, way)
    return (out, lse) if fields["return_lse"] else out


def to_symbols(function: Callable[..., Any], fields: dict[str, Any], impl: str | None) -> Any:
    """Let a value that stands for a tensor note down a call."""
    given = {"dropout_p" if name == "dropout" else name: value for name, value in fields.items()}
    tensors = given["query"], given["key"], given["value"]
    return handle_torch_function(function, tensors, **given, impl=impl)


def are_numbers(variant: Any, window: Any, softcap: Any, sinks: Any, slopes: Any, used: Any = None) -> bool:
    """Whether what a call asks for beyond PyTorch's own arguments is numbers alone, exactly of their kinds."""
    return (
        sinks is None
        and slopes is None
        and used is None
        and type(variant) is CausalVariant
        and type(softcap) in NUMBERS
        and type(window) is tuple
        and len(window) == 2
        and type(window[0]) is int is type(window[1])
    )


def _is_plain_mask(mask: Tensor, query: Tensor) -> bool:
    """Whether PyTorch's function takes this mask as it is; it also takes some that it then misreads."""
    return (
        type(mask) in PLAIN
        and query.get_device() < 0  # CUDA kernels misread what `torch` first converts
        and mask.device == query.device
        and 1 < mask.dim() <= query.dim()
        and (mask.dtype is torch.bool or mask.dtype is query.dtype or query.dtype is not torch.float64)
    )


def _are_of_four(*tensors: Tensor) -> bool:
    """Whether tensors have four dimensions: a trace of PyTorch 2.11 breaks where another number is unpacked."""
    return all(tensor.dim() == 4 for tensor in tensors)


def _agree(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether PyTorch's function has nothing left to refuse of a call; its error would leave a trace as Dynamo's."""
    if not (query.dtype is key.dtype is value.dtype and query.device == key.device == value.device and dropout >= 0.0):
        return False
    if mask is None:
        return True
    if not (mask.dtype is torch.bool or mask.dtype is query.dtype or mask.dtype is torch.float32):
        return False
    whole = (*query.shape[:-1], key.shape[-2])[-mask.dim() :]  # of no fewer dimensions, as `_is_plain_mask` has seen
    return all(
        holds_in_trace(have == 1) or holds_in_trace(have == want) for have, want in zip(mask.shape, whole, strict=True)
    )


def _fit_cuda(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether PyTorch's CUDA kernels get such tensors right without what `torch` rewrites: see `builtin.faults`.

    They load 16 bytes at once, and fault where a tensor does not start at a multiple of it. A trace cannot ask, and
    assumes it: see `builtin.rewrites.starts_aligned`.
    """
    tracing = is_dynamo_compiling() or (type(query) not in PLAIN and is_compiling())  # the latter takes 0.1 us
    holds, shape = holds_in_trace if tracing else bool, query.shape
    if dropout:
        *_, errs = cudnn_errs(query.get_device())
        if errs or holds(query.numel() * key.shape[-2] >= 2**31 * shape[-1]):  # too many numbers to draw
            return False
    if holds(shape[-2] == 1):
        errs, errs_in_gradients, _ = cudnn_errs(query.get_device())
        if errs or (errs_in_gradients and _records(query, key, value)):
            return False
    # Heads that share their keys. All strides are read, because to ask for one takes twice as long.
    if len(shape) > 2 and holds(key.stride()[-3] == 0) and holds(value.stride()[-3] == 0):
        return False
    if _records(query, key, value) and (holds(query.numel() >= LARGE) or holds(shape[-1] < 8)):
        return False
    if tracing:
        return True
    # Outside a trace no offset is a symbol, as its type would allow. They are judged at once, because what each must be
    # a multiple of is a power of two.
    starts = query.storage_offset() | key.storage_offset() | value.storage_offset()  # type: ignore[operator]
    return not starts or starts * query.element_size() % 16 == 0


def _records(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def is_symbolic(query: Any) -> bool:
    """Whether this is not a tensor but answers like one: a value of `torch.fx.symbolic_trace`."""
    return type(query) not in PLAIN and not isinstance(query, Tensor) and hasattr(type(query), "__torch_function__")
