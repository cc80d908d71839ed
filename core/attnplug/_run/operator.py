"""One operator of its own for each kernel that a trace cannot look into.

`torch.compile`, `torch.export` and fake tensors see a kernel that is not made of PyTorch operators as one
opaque operator `attnplug::<name>`, with a fake kernel and autograd, made here from the same forward and
backward that eager calls use. Eager calls do not pass through it: a call through PyTorch's dispatcher
costs more than the rest of the path.

A graph has to know the shapes of what forward saves for backward before it runs. A kernel that saves and
has no `fake` to say so is not asked: its backward runs forward once more, under the same random state.

PyTorch keeps compiled graphs on disk and finds them by their text, in which an operator is a name and its
arguments. So that a graph is not found that was compiled for another version of a kernel, which saved other
tensors for backward, a digest of what forward returns is one of its arguments.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from attnplug._errors import GradientError
from attnplug._registry.kernel import OfOneRank
from attnplug._registry.registry import Entry
from attnplug._run.batched import one_by_one, refuse_equal_draws
from attnplug._run.constant_lse import constant_lse, refusal, without_gradient
from attnplug._run.contract import (
    CONSTANTS,
    DIFFERENTIABLE,
    TENSORS,
    BackwardInputs,
    Given,
    KernelCall,
    Result,
    declares,
    no_second_derivatives,
    tensors_of,
)
from attnplug._run.flops import count_flops
from attnplug._run.library import free_name, library, operator_name
from attnplug._selection.state import start, thread
from attnplug._selection.watching import TENSORS as WATCHED_TENSORS
from attnplug._selection.watching import Gradients, RecordedCall, differentiated
from attnplug._tracing import constant_in_traces
from attnplug._types import CausalVariant, Feature, SDPAParams
from attnplug._version import __version__

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? seqused_k, Tensor? cu_seq_q, Tensor? cu_seq_k, Tensor? block_table, float dropout, bool is_causal, "
    "bool enable_gqa, float scale, int causal_variant, int[] window_size, float softcap, bool return_lse, "
    "SymInt? max_q, SymInt? max_k, int draw"
)
_FORWARD = f"({ARGUMENTS}, str saves='') -> (Tensor out, Tensor lse, Tensor[] saved)"
_BACKWARD = (
    f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor? lse, Tensor?[] saved, bool[] wanted, bool whole, "
    f"{ARGUMENTS}) -> Tensor[]"
)
SAVES = hashlib.sha256(f"{__version__} {_FORWARD} {_BACKWARD}".encode()).hexdigest()[:16]
"""A digest of what all compiled graphs rely on; what one relies on besides is what forward returns."""
_NAMES = tuple(part.split()[-1] for part in ARGUMENTS.split(", "))

count_modes = torch._C._len_torch_dispatch_stack
is_jit_tracing = torch._C._is_tracing
_draws = itertools.count(1)


@cache
def operator_of(entry: Entry) -> Operator:
    """Return the operator of the chosen kernel, defining it at the first call."""
    return Operator(entry)


def is_watched(query: Tensor) -> bool:
    """Whether something (a trace, fake tensors, a dispatch mode) must see a kernel as an operator.

    `torch.jit.trace` would take what an opaque kernel returns for a constant.
    """
    is_plain = type(query) is Tensor or type(query) is torch.nn.Parameter
    return not is_plain or count_modes() > 0 or is_jit_tracing()


class Operator:
    """The operators of one kernel, `attnplug::<name>` and `attnplug::<name>_backward`."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self.kernel = entry.kernel
        self._gives_lse = declares(entry, Feature.LSE)
        self._saves = False
        """Whether forward has ever saved something that it has no `fake` to describe."""
        name = free_name(entry.name)
        tags = (torch.Tag.nondeterministic_seeded,) if declares(entry, Feature.DROPOUT) else ()
        for suffix, schema, real, fake in (
            ("", _FORWARD, self._forward, self._fake_forward),
            ("_backward", _BACKWARD, self._backward, self._fake_backward),
        ):
            library().define(f"{name}{suffix}{schema}", tags=() if suffix else tags)
            library().impl(f"{name}{suffix}", real, "CompositeExplicitAutograd")
            torch.library.register_fake(f"attnplug::{name}{suffix}", fake, lib=library())
        torch.library.register_autograd(
            f"attnplug::{name}", self._differentiate, setup_context=self._remember, lib=library()
        )
        torch.library.register_vmap(f"attnplug::{name}", self._each, lib=library())
        forward, backward = getattr(torch.ops.attnplug, name), getattr(torch.ops.attnplug, f"{name}_backward")
        self.forward, self.backward = forward.default, backward.default
        count_flops(forward, backward, params_from)

    def saves(self, params: SDPAParams) -> str:
        """Return the digest of what forward returns for a call of fake tensors; see `SAVES`."""
        out, lse, saved = self._fake_forward(*arguments_of(params))
        described = [(tensor.dtype, tensor.shape, tensor.stride(), str(tensor.device)) for tensor in (out, lse, *saved)]
        return hashlib.sha256(f"{SAVES} {described}".encode()).hexdigest()[:16]

    def run(self, params: SDPAParams) -> Result:
        """Run the operator; returns `out` and `lse`, None unless asked for."""
        out, lse, _ = self.forward(*arguments_of(params))
        if not params.return_lse:
            return out, None
        return out, without_gradient(constant_lse(), refusal(self._entry), params, lse)

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        call, tensors = self._call(arguments)
        before = self._random_state(call, tensors)
        out, lse, *saved = call.forward(tensors)
        if self.kernel.fake is None:
            self._saves |= bool(saved)
            out, saved = out.contiguous(), before
        return out, _no_lse(call, tensors) if lse is None else lse, saved

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        call, tensors = self._call(arguments)
        described = call.fake(tensors)
        if described is not None:
            out, lse, *saved = described
            return out, _no_lse(call, tensors) if lse is None else lse, saved
        params = call.params(tensors)
        query, value = params.query, params.value
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        before = [
            torch.empty(state.shape, dtype=state.dtype, device="cpu") for state in self._random_state(call, tensors)
        ]
        if not self._gives_lse:
            return out, _no_lse(call, tensors), before
        return out, query.new_empty(params.lse_shape, dtype=params.lse_dtype), before

    def _backward(
        self,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        saved: list[Any],
        wanted: list[bool],
        whole: bool,
        *arguments: Any,
    ) -> list[Tensor]:
        """Run backward; `whole` says that forward was the operator, too, and `saved` what that returned."""
        call, tensors = self._call(arguments)
        if not whole:
            call = KernelCall.of(self._entry, params_from(arguments))
        with torch.no_grad():
            if whole and self.kernel.fake is None and self._saves:
                with _random_state(saved, out.device):
                    _, _, *saved = call.forward(tensors)
            elif whole and self.kernel.fake is None:
                saved = []
            with _autograd_works():
                grads = call.backward(BackwardInputs(tensors, tuple(wanted), grad_out, grad_lse, out, lse, saved))
        # What a rank has of a call is nothing that a watcher could compare, and its implementation is in no registry.
        if whole and thread.state.watched == WATCHED_TENSORS and not isinstance(self._entry.spec.kernel, OfOneRank):
            self._tell(params_from(arguments), dict(zip(DIFFERENTIABLE, grads, strict=True)), grad_out, grad_lse)
        return _fresh([grad for grad in grads if grad is not None], (*tensors, grad_out, grad_lse, out, lse, *saved))

    def _tell(self, params: SDPAParams, grads: dict[str, Any], grad_out: Any, grad_lse: Any) -> None:
        """Tell those who watch of a backward."""
        found = {name: grad for name, grad in grads.items() if grad is not None}
        call = RecordedCall(self._entry.name, self._entry.spec.backend, {}, str(params.query.device))
        differentiated(call, params, Gradients(found, grad_out, grad_lse))

    def _fake_backward(
        self,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        saved: list[Any],
        wanted: list[bool],
        whole: bool,
        *arguments: Any,
    ) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor, want in zip(arguments, wanted, strict=False) if want]

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        out, lse, saved = output
        ctx.count = len(TENSORS)
        ctx.save_for_backward(*inputs[: ctx.count], out, lse, *saved)
        ctx.constants = inputs[ctx.count : len(_NAMES)]
        ctx.set_materialize_grads(False)
        if not declares(self._entry, Feature.LSE_GRADIENT):
            ctx.mark_non_differentiable(lse)

    def _differentiate(self, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_saved: Any) -> Any:
        everything = ctx.saved_tensors  # which a checkpoint lets one ask for once
        inputs, (out, lse, *saved) = everything[: ctx.count], everything[ctx.count :]
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        if forward_ad._current_level >= 0 and (_has_tangent(grad_out) or _has_tangent(grad_lse)):
            raise GradientError(no_second_derivatives(self._entry))
        wanted = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        grads = iter(self.backward(grad_out, grad_lse, out, lse, saved, wanted, True, *inputs, *ctx.constants))
        given = [next(grads) if want else None for want in wanted]
        return (*given, *(None for _ in ctx.needs_input_grad[len(given) :]))

    def _each(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        """Run forward on each element that `vmap` has."""
        count, last = len(TENSORS), len(_NAMES) - 1
        before, (draw, *after) = arguments[count:last], arguments[last:]
        refuse_equal_draws(self._call(arguments)[0], info.randomness)

        def run(tensors: Given) -> tuple[Tensor, ...]:
            out, lse, saved = self.forward(*tensors, *before, draw and _next_draw(), *after)
            return out, lse, *saved

        (out, lse, *saved), dims = one_by_one(info.batch_size, in_dims[:count], arguments[:count], run)
        return (out, lse, saved), (0, 0, list(dims[2:]))

    def _random_state(self, call: KernelCall, tensors: tuple[Any, ...]) -> list[Tensor]:
        """Return what backward needs to run forward again: the random state, if forward draws numbers."""
        if self.kernel.fake is not None or self.kernel.backward is None or not call.constant("dropout"):
            return []
        with _disable_current_modes():
            return [_generator_state(tensors[0].device)]

    def _call(self, arguments: tuple[Any, ...]) -> tuple[KernelCall, tuple[Any, ...]]:
        """Return the call that the operator's arguments describe, and its tensors."""
        # The operator's lse has one shape: there whenever the kernel can give one, asked for or not.
        params = replace(params_from(arguments), return_lse=self._gives_lse)
        return KernelCall.of(self._entry, params), arguments[: len(TENSORS)]


class OperatorCall(KernelCall):
    """A call that is made through the kernel's operators, where something watches."""

    def forward(self, tensors: Given) -> tuple[Any, ...]:
        out, lse, saved = operator_of(self.entry).forward(*arguments_of(self.params(tensors)))
        return out, lse, *saved

    def backward(self, given: BackwardInputs) -> list[Tensor | None]:
        return _backward(operator_of(self.entry).backward, self.params(given.tensors), True, given)


def _autograd_works() -> Any:
    """Let a kernel that runs in an operator, where PyTorch records nothing, use autograd as it may in eager code."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def backward_in_trace(call: KernelCall, given: BackwardInputs) -> list[Tensor | None]:
    """Run the backward of a call whose forward ran in eager code, where compiled autograd or a mode sees backward.

    A trace cannot look into the kernel.
    """
    id(call.entry)  # of which a trace takes the name for a constant: this makes it guard on the entry itself
    if given.grad_lse is not None and (refused := call.entry.constant(refusal)):  # or it would be no error of the trace
        raise GradientError(refused)
    operator = getattr(torch.ops.attnplug, call.entry.constant(_name_of_backward)).default
    fields: dict[str, Any] = dict(zip((*TENSORS, *CONSTANTS), (*given.tensors, *call.constants), strict=True))
    with torch.no_grad():
        return _backward(operator, SDPAParams(**fields), False, given)


def _name_of_backward(entry: Entry) -> str:
    """Return the name of the operator of an implementation's backward, defining it at the first call."""
    return operator_of(entry).backward.__name__.partition(".")[0]


def _backward(operator: Any, params: SDPAParams, whole: bool, given: BackwardInputs) -> list[Tensor | None]:
    """Run the operator of a backward; return a gradient for each of `DIFFERENTIABLE` that is wanted."""
    _, wanted, grad_out, grad_lse, out, lse, saved = given
    if grad_out is None and grad_lse is None:
        return [None for _ in wanted]
    grads = iter(operator(grad_out, grad_lse, out, lse, list(saved), list(wanted), whole, *arguments_of(params)))
    return [next(grads) if want else None for want in wanted]


def params_from(arguments: tuple[Any, ...]) -> SDPAParams:
    """Return the call that `arguments_of` took apart; the digest of what forward returns may follow."""
    values = dict(zip(_NAMES, arguments, strict=False))
    del values["draw"]
    values["causal_variant"] = CausalVariant(values["causal_variant"])
    values["window_size"] = tuple(values["window_size"])
    return SDPAParams(**values)


def arguments_of(params: SDPAParams) -> tuple[Any, ...]:
    """Return `params` as the operators of this module take it."""
    return (
        *tensors_of(params),
        params.dropout,
        params.is_causal,
        params.enable_gqa,
        params.scale,
        int(params.causal_variant),
        list(params.window_size),
        params.softcap,
        params.return_lse,
        params.max_q,
        params.max_k,
        _next_draw() if params.dropout > 0 else 0,
    )


@constant_in_traces
def _next_draw() -> int:
    """Return another number at each call: a graph merges operators whose arguments are equal, random ones too."""
    return next(_draws)


def _generator_state(device: torch.device) -> Tensor:
    """Return the state of the device's default generator."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    if not module.is_available():  # fake tensors of a device that is not there: seed and offset, 8 bytes each
        return torch.empty(16, dtype=torch.uint8, device="cpu")
    return module.get_rng_state(device)


def _has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode derivatives are asked for of a tensor; an operator would lose them."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


@contextmanager
def _random_state(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Put the device's default generator into the state in `states`, if there is one, and back afterwards."""
    if not states:
        yield
        return
    others = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        if others:
            torch.get_device_module(device).set_rng_state(states[0], device)
        else:
            torch.set_rng_state(states[0])
        yield


class _Namespace(torch._ops._OpNamespace):
    """`torch.ops.attnplug`, which defines the operator of an implementation when it is looked up.

    A program that was exported in another process names operators that nothing has needed yet in this one.
    """

    __module__ = "torch._ops"  # from which generated code makes the names of operators

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            for entry in start() if not name.startswith("_") else ():
                if name.removesuffix("_backward") == operator_name(entry.name) and entry.load() is not None:
                    operator_of(entry)
                    return super().__getattr__(name)
            raise


setattr(torch.ops, "attnplug", _Namespace("attnplug"))  # noqa: B010, to type checkers it is a module


def _fresh(grads: list[Tensor], given: Given) -> list[Tensor]:
    """Return contiguous gradients, none of which is another or an input: a graph reuses memory as if they were not."""
    taken = {tensor.data_ptr() for tensor in given if tensor is not None}
    found = []
    for grad in grads:
        grad = grad.contiguous()
        found.append(grad.clone() if grad.data_ptr() in taken else grad)
        taken.add(grad.data_ptr())
    return found


def _no_lse(call: KernelCall, tensors: tuple[Any, ...]) -> Tensor:
    """Return what stands for an lse where there is none: an operator's result cannot be None."""
    return tensors[0].new_empty((0,), dtype=call.params(tensors).lse_dtype)


assert _NAMES[: len(TENSORS)] == TENSORS
assert set(_NAMES[len(TENSORS) :]) == {*CONSTANTS, "draw"}
