"""What the core and a kernel owe each other, in one place: what goes in, what must come out, for every caller.

Autograd, operators and the transforms of `torch.func` each run kernels in their own way; what they run is a
`KernelCall`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug._call.autocast import any_autocast, no_autocast
from attnplug._errors import GradientError, KernelError
from attnplug._messages import of_error
from attnplug._params import params_of
from attnplug._registry.registry import BUILTIN, Entry
from attnplug._selection.state import process, thread
from attnplug._types import Feature, SDPAParams

TENSORS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "sinks",
    "alibi_slopes",
    "seqused_k",
    "cu_seq_q",
    "cu_seq_k",
    "block_table",
)
DIFFERENTIABLE = TENSORS[:5]
CONSTANTS = tuple(item.name for item in fields(SDPAParams) if item.name not in TENSORS)

Given = tuple[Tensor | None, ...]
Result = tuple[Tensor, Tensor | None]  # out and lse


def tensors_of(params: SDPAParams) -> Given:
    """Return the tensors of a call, in the order of `TENSORS`."""
    return tuple([getattr(params, name) for name in TENSORS])


_constants_of = attrgetter(*CONSTANTS)  # which a trace could not take
_besides_of = attrgetter(*TENSORS[3:])


class Order:
    """The tensors that a call has, in the order of `TENSORS`, and starts of queries and keys that are one tensor once.

    Args:
        absent: for each of `TENSORS` after query, key and value, whether the call has none.
        same_starts: whether those of queries and keys are one tensor.

    Attributes:
        count: how many there are.
    """

    def __init__(self, absent: tuple[bool, ...], same_starts: bool) -> None:
        missing = {name for name, is_absent in zip(TENSORS[3:], absent, strict=True) if is_absent}
        names = [name for name in TENSORS if name not in missing and not (same_starts and name == "cu_seq_k")]
        self._places = {name: place for place, name in enumerate(names)}
        if same_starts:
            self._places["cu_seq_k"] = self._places["cu_seq_q"]
        self.count = len(names)
        self._of_whole = tuple([self._places.get(name, -1) for name in TENSORS])  # what a trace of backward reads
        self._of_own = tuple([TENSORS.index(name) for name in names])

    @classmethod
    def of(cls, params: SDPAParams) -> Order:
        """Return that of one call. 2 us."""
        absent = tuple([tensor is None for tensor in _besides_of(params)])
        return _order(absent, params.cu_seq_q is params.cu_seq_k is not None)

    def getter(self, names: tuple[str, ...]) -> itemgetter[Any]:
        """Return what takes the values of these names out of one for each tensor, and one for those that are absent."""
        return itemgetter(*[self._places.get(name, -1) for name in names])

    def whole(self, own: Sequence[Any], absent: Any = None) -> tuple[Any, ...]:
        """Return one value for each of `TENSORS`, given one for each tensor that there is."""
        given = (*own, absent)
        return tuple([given[place] for place in self._of_whole])

    def own(self, whole: Sequence[Any]) -> tuple[Any, ...]:
        """Return one value for each tensor that there is, given one for each of `TENSORS`."""
        return tuple([whole[place] for place in self._of_own])


_order = cache(Order)
_NOTHING = nullcontext()


class BackwardInputs(NamedTuple):
    """What the backward of a call is given.

    Attributes:
        tensors: those of the call, in the order of `TENSORS`.
        wanted: for each of `DIFFERENTIABLE`, whether its gradient is.
        grad_out: the gradient of out; None for 0.
        grad_lse: likewise.
        out: what forward returned.
        lse: likewise.
        saved: what else it returned.
    """

    tensors: Given
    wanted: tuple[bool, ...]
    grad_out: Tensor | None
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor | None
    saved: Sequence[Tensor | None]


@dataclass(frozen=True)
class KernelCall:
    """A chosen kernel, and what a call is besides its tensors. Its methods take those, in the order of `TENSORS`."""

    entry: Entry
    constants: tuple[Any, ...]  # in the order of CONSTANTS

    @classmethod
    def of(cls, entry: Entry, params: SDPAParams) -> KernelCall:
        return cls(entry, _constants_of(params))

    def constant(self, name: str) -> Any:
        return self.constants[CONSTANTS.index(name)]

    def params(self, tensors: Given) -> SDPAParams:
        """Return the description of the call, as the kernel gets it."""
        fields: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        fields.update(zip(CONSTANTS, self.constants, strict=True))
        return params_of(fields)

    def forward(self, tensors: Given) -> tuple[Any, ...]:
        """Run the kernel's forward; return `(out, lse, *saved)`.

        Raises:
            KernelError: it returned something else than it must.
        """
        return run_forward(self.entry, self.params(tensors))

    def backward(self, given: BackwardInputs) -> list[Tensor | None]:
        """Run the kernel's backward, without autocast; return a gradient for each of `DIFFERENTIABLE` that is wanted.

        The kernel sees by `requires_grad` which are. It records no graph, unless someone wants to differentiate
        its result and it declares second derivatives.

        Raises:
            GradientError: a gradient is asked for that the kernel does not give.
            KernelError: it returned something else than it must.
        """
        entry = self.entry
        tensors, wanted, grad_out, grad_lse, out, lse, saved = given
        if grad_lse is not None and not declares(entry, Feature.LSE_GRADIENT):
            raise GradientError(no_lse_gradient(entry))
        backward = entry.kernel.backward
        if backward is None:
            raise GradientError(f"implementation {entry.name!r} has no backward")
        if grad_out is None and grad_lse is None:
            return [None] * len(DIFFERENTIABLE)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        tensors, grad_out, grad_lse = _as_in_memory(tensors), *_as_in_memory((grad_out, grad_lse))
        recording = torch.is_grad_enabled()
        once = not (recording and declares(entry, Feature.SECOND_DERIVATIVES))
        if once:  # second derivatives go through the tensors themselves
            tensors = (*map(marked, tensors, wanted), *tensors[len(wanted) :])
        params = self.params(tensors)
        with no_autocast(params.query), torch.no_grad() if once and recording else _NOTHING:
            returned = in_kernel(backward, params, grad_out, grad_lse, out, lse, *saved)
            return checked_gradients(entry.name, params, returned)

    def fake(self, tensors: Given) -> tuple[Any, ...] | None:
        """Return what the kernel says that its forward returns, as empty tensors; None if it does not say.

        Raises:
            KernelError: it failed to.
        """
        kernel = self.entry.kernel
        if kernel.fake is None:
            return None
        try:
            out, lse, *saved = kernel.fake(self.params(tensors))
        except Exception as error:  # an author's code may raise anything; what it raised is the cause
            raise KernelError(f"implementation {self.entry.name!r}: fake raised {of_error(error)}") from error
        return out, lse, *saved


def run_forward(entry: Entry, params: SDPAParams) -> tuple[Any, ...]:
    """Run a kernel's forward, without autocast, and check what it returns; built-in kernels are not checked."""
    if entry.distribution == BUILTIN:
        run = entry.kernel.forward
    else:
        run = partial(checked_forward, entry)
        if _is_negated(params):
            params = KernelCall.of(entry, params).params(_as_in_memory(tensors_of(params)))
    if any_autocast():
        with no_autocast(params.query):
            return run(params)
    return run(params)


def checked_forward(entry: Entry, params: SDPAParams) -> tuple[Any, ...]:
    """Run a plugin's forward where there is no autocast, and check what it returns.

    Raises:
        KernelError: it returned something else than it must.
    """
    returned = in_kernel(entry.kernel.forward, params)
    check_outputs(entry.name, params, returned)
    return returned


def in_kernel(function: Callable[..., Any], *args: Any) -> Any:
    """Call a plugin's function. PyTorch's own attention is not routed in it: a kernel made of it would call itself."""
    if not process.is_patched:  # nor anywhere else; to store in a `threading.local` takes 0.2 us
        return function(*args)
    return unrouted(function, *args)


def unrouted(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in which PyTorch's attention is not routed, though it is replaced."""
    outer = thread.in_kernel
    thread.in_kernel = True
    try:
        return function(*args)
    finally:
        thread.in_kernel = outer


def check_outputs(name: str, params: SDPAParams, returned: Any) -> None:
    """Raise KernelError unless `returned` is `(out, lse, *saved)` as a forward must return it."""
    if not isinstance(returned, tuple) or len(returned) < 2:
        raise KernelError(
            f"implementation {name!r}: forward must return a tuple (out, lse, *saved), lse None where it computes "
            f"none; got {_kind(returned)}"
        )
    for item in returned[2:]:
        if item is not None and not isinstance(item, Tensor):
            raise KernelError(f"implementation {name!r}: forward must save tensors, got {type(item).__name__}")
    query, out, lse = params.query, returned[0], returned[1]
    if query.is_nested:
        return
    shape, dtype, device, size = query.shape, query.dtype, query.device, params.value.shape[-1]
    _check_output(name, "out", out, shape if size == shape[-1] else (*shape[:-1], size), dtype, device)
    if lse is not None or params.return_lse:
        # `lse_shape` and `lse_dtype` say the same, and would read shape and dtype again
        rows = (shape[1], shape[0]) if params.cu_seq_q is not None else shape[:-1]
        _check_output(name, "lse", lse, rows, torch.float64 if dtype is torch.float64 else torch.float32, device)


def _kind(returned: Any) -> str:
    """Return what is said of something else than a tuple of the right length."""
    if returned is None:
        return "None"
    return type(returned).__name__ + (f" of {len(returned)}" if isinstance(returned, (tuple, list)) else "")


def no_lse_gradient(entry: Entry) -> str:
    """Return the message of the error for a gradient through lse that the implementation does not give."""
    return f"implementation {entry.name!r} gives no gradient through lse; detach lse, or use one that does"


def no_second_derivatives(entry: Entry) -> str:
    """Return the message of the error for second derivatives that the implementation does not have."""
    return (
        f"implementation {entry.name!r} has no second derivatives; use one of the MATH family for them, "
        f"for example inside sdpa_kernel(SDPBackend.MATH)"
    )


def no_forward_derivatives(entry: Entry) -> str:
    """Return the message of the error for forward-mode derivatives that the implementation does not have."""
    return (
        f"implementation {entry.name!r} has no forward-mode derivatives; use one of the MATH family, "
        f"for example inside sdpa_kernel(SDPBackend.MATH)"
    )


def declares(entry: Entry, feature: Feature) -> bool:
    """Whether the implementation's capabilities name this feature."""
    return feature in entry.spec.capabilities.features


def _is_negated(params: SDPAParams) -> bool:
    """Whether a tensor of a call is not as it lies in memory; those of lengths are always."""
    for tensor in (params.query, params.key, params.value, params.attn_mask, params.sinks, params.alibi_slopes):
        if tensor is not None and tensor.is_neg():
            return True
    return False


def _as_in_memory(tensors: Given) -> Given:
    """Return tensors that are as they lie in memory, where kernels read: PyTorch puts off a minus (`z.conj().imag`)."""
    return tuple([tensor if tensor is None else tensor.resolve_neg() for tensor in tensors])


def marked(tensor: Tensor | None, want: bool) -> Tensor | None:
    """Return a tensor that says by `requires_grad` whether its gradient is wanted: below autograd it does not."""
    if tensor is None or tensor.requires_grad is want:
        return tensor
    return tensor.detach().requires_grad_(want)


def _check_output(
    name: str, what: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise KernelError unless `tensor` has the shape, dtype and device that the contract gives it."""
    if not isinstance(tensor, Tensor):
        raise KernelError(f"implementation {name!r}: {what} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise KernelError(f"implementation {name!r}: {what} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelError(f"implementation {name!r}: {what} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise KernelError(f"implementation {name!r}: {what} must be on {device}, got {tensor.device}")


def checked_gradients(name: str, params: SDPAParams, returned: Any) -> list[Tensor | None]:
    """Return one gradient, or None where none is wanted, for each of `DIFFERENTIABLE`."""
    if not isinstance(returned, (tuple, list)) or not 3 <= len(returned) <= 5:
        raise KernelError(
            f"implementation {name!r}: backward must return (grad_query, grad_key, grad_value[, grad_attn_mask"
            f"[, grad_sinks]]), got {_kind(returned)}"
        )
    grads: list[Tensor | None] = []
    for position, field in enumerate(DIFFERENTIABLE):
        tensor = getattr(params, field)
        grad = returned[position] if position < len(returned) else None
        if tensor is None or not tensor.requires_grad:
            grads.append(None)
            continue
        if grad is None:
            raise no_gradient(name, field)
        if field == "attn_mask":
            grad = _summed(name, grad, tensor)
        _check_output(name, f"the gradient of {field}", grad, tuple(tensor.shape), tensor.dtype, tensor.device)
        grads.append(grad)
    return grads


def no_gradient(name: str, field: str) -> KernelError:
    """Return the error for a gradient that is wanted and not there."""
    return KernelError(f"implementation {name!r}: backward returned no gradient of {field}, which is required")


def _summed(name: str, grad: Any, mask: Tensor) -> Tensor:
    """Sum the gradient of a broadcast mask to the mask's shape."""
    try:
        return grad.sum_to_size(mask.shape).to(mask.dtype)
    except (AttributeError, RuntimeError):
        got = tuple(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
        raise KernelError(
            f"implementation {name!r}: the gradient of attn_mask must broadcast from {tuple(mask.shape)}, got {got}"
        ) from None
