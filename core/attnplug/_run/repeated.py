"""Calls that repeat one in all but where their tensors lie in memory: forward and backward as the kernel prepared them.

What else is looked up for each call is decided here once for each kind of tensors: the record that the kernel gets, in
which tensors say whether their gradient is wanted; whether they are what they look like in memory; whether someone
looks on; and whether the kernel returns what it must.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from attnplug._call.autocast import any_autocast, no_autocast
from attnplug._call.comparing import compared
from attnplug._errors import KernelError
from attnplug._run.batched import is_wrapped
from attnplug._run.contract import (
    DIFFERENTIABLE,
    TENSORS,
    KernelCall,
    Order,
    check_outputs,
    checked_gradients,
    in_kernel,
    marked,
    no_gradient,
    run_forward,
)
from attnplug._run.operator import is_watched
from attnplug._run.transforms import is_transformed
from attnplug._types import SDPAParams

KINDS = 8
"""For how many kinds of tensors backward is prepared: gradients may come in ever new strides."""
PACKED = (
    *("query", "key", "value", "cu_seq_q", "cu_seq_k"),
    *("sinks", "alibi_slopes", "seqused_k", "block_table"),
)
"""The tensors of packed sequences, as a kernel gets them: in the order in which `varlen_attn` takes them."""
strided = torch.strided
_ABSENT = (None,) * len(TENSORS)
_DENSE = Order(absent=(True,) * len(TENSORS[3:]), same_starts=False)

Run = Callable[..., Any]


class Repeated:
    """What a kernel prepared for calls that repeat one.

    Args:
        call: what they are besides their tensors.
        params: one of them, which is not kept.
        run: what the kernel prepared.

    Attributes:
        call: as above.
        order: of their tensors, as methods take them.
        run: as above, of these tensors, outside autocast.
        is_checked: whether what it returns has been checked.
    """

    def __init__(self, call: KernelCall, params: SDPAParams, run: Run) -> None:
        packed = params.is_varlen
        self.call, self.order = call, Order.of(params) if packed else _DENSE
        self._as_taken = as_taken = self.order.getter(PACKED) if packed else None
        own: Run = run if as_taken is None else lambda *own: run(*as_taken((*own, None)))
        self.run = _inside(no_autocast(params.query), own) if any_autocast() else own
        self.is_checked = False
        self._prepare = call.entry.kernel.prepare_backward
        self._backwards: list[tuple[Hashable, Callable[..., bool], Run | None]] = []

    def params(self, *tensors: Tensor | None) -> SDPAParams:
        """Return the description of a call of these tensors."""
        return self.call.params(self.order.whole(tensors))

    def forward(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Return `(out, lse, *saved)`, checked at the first call."""
        returned = in_kernel(self.run, *tensors)
        if returned is None:
            return run_forward(self.call.entry, self.params(*tensors))
        if not self.is_checked:
            check_outputs(self.call.entry.name, self.params(*tensors), returned)
            self.is_checked = True
        return returned

    def backward(self, needs: tuple[bool, ...], grad_out: Tensor, *everything: Any) -> Any:
        """Return the gradients of the tensors; None where `KernelCall.backward` has to run.

        Given are which tensors need a gradient, these tensors, out, lse or None, and what else forward saved. All are
        looked at, because hooks of saved tensors may have changed them.
        """
        if self._prepare is None:
            return None
        count = self.order.count
        given, saved = everything[:count], everything[count:]
        tensors = (grad_out, *everything) if saved[1] is not None else (grad_out, *given, saved[0], *saved[2:])
        for tensor in tensors:
            if tensor is None or tensor.layout is not strided or tensor.is_nested:  # `compared` takes no others
                return None
        kind = needs, saved[1] is None, len(saved)
        for known, fits, run in self._backwards:
            if known == kind and fits(*tensors):
                if run is None:
                    return None
                grads = in_kernel(run, *given, grad_out, *saved)
                # What else is wrong with them autograd says; one that is missing it takes for zeros.
                if grads is not None and (count > 3 or grads[0] is None or grads[1] is None or grads[2] is None):
                    self._check_that_all_are_there(needs, grads)
                return self._own(grads)
        unlike = any(tensor.is_neg() or is_wrapped(tensor) for tensor in tensors)  # what lies in memory
        seen = unlike or is_watched(grad_out) or is_transformed()
        fits_these = None if seen or len(self._backwards) >= KINDS else compared(tensors)
        if fits_these is None:
            return None
        run, grads = self._prepare_backward(needs, grad_out, given, saved)
        self._backwards.append((kind, fits_these, run))
        return self._own(grads)

    def _own(self, grads: Any) -> Any:
        """Return gradients as autograd takes them, given what a kernel returned."""
        if grads is None or self._as_taken is None:
            return grads if grads is None else grads[:3]
        return self.order.own((*grads, *_ABSENT))

    def _taking_own(self, run: Run) -> Run:
        """Return what takes a call's own tensors, and then what `run` does: those of packed sequences go by places."""
        as_taken, count = self._as_taken, self.order.count
        if as_taken is None:
            return run
        return lambda *given: run(*as_taken((*given[:count], None)), *given[count:])

    def _check_that_all_are_there(self, needs: tuple[bool, ...], grads: Any) -> None:
        wanted = self.order.whole(needs, False)
        for field, want, grad in zip(DIFFERENTIABLE, wanted, (*grads, None, None), strict=False):
            if want and grad is None:
                raise no_gradient(self.call.entry.name, field)

    def _prepare_backward(
        self, needs: tuple[bool, ...], grad_out: Tensor, given: tuple[Any, ...], saved: tuple[Any, ...]
    ) -> tuple[Run | None, Any]:
        """Return what the kernel prepares for tensors like these, if it does, and what that returns, checked."""
        assert self._prepare is not None
        params, name = self.params(*map(marked, given, needs)), self.call.entry.name
        run = in_kernel(self._prepare, params, grad_out, *saved)
        if run is None:
            return None, None
        if not callable(run):
            got = type(run).__name__
            raise KernelError(f"implementation {name!r}: prepare_backward must return a function or None, got {got}")
        run = self._taking_own(run)
        grads = in_kernel(run, *given, grad_out, *saved)
        return run, None if grads is None else checked_gradients(name, params, grads)


def _inside(context: Any, run: Run) -> Run:
    """Return what calls a function inside a context, which can be entered again."""

    def inside(*tensors: Any) -> Any:
        with context:
            return run(*tensors)

    return inside
