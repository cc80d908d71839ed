"""From an `ImplSpec`'s `kernel` to the functions that run, checked where the author can still be named.

A kernel is imported when it is first chosen, because a broken CUDA build must break neither
`import attnplug` nor any call that does not need it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attnplug._errors import SpecError, did_you_mean
from attnplug._messages import is_stop, of_error, printable
from attnplug._types import Feature, ImplSpec, SDPAParams

if TYPE_CHECKING:
    import torch

Reasons = str | Sequence[str] | None


@dataclass(frozen=True)
class Kernel:
    """What a kernel may define. An author writes a module or an object with attributes of these names.

    Only `forward` must be there. A public attribute whose name is nearly one of these, such as `support` or
    `shape_dependant`, is an error if the author defined it: it would be ignored, and a lost `supports` means wrong
    results. Imported names, and names that begin with an underscore, are not checked.

    Attributes:
        forward: `forward(params) -> (out, lse, *saved)`. `out` has the query's dtype; `lse` is float32
            (float64 for float64 inputs), or None where the kernel gives none; `saved` are the tensors
            that backward needs besides.
        backward: `backward(params, grad_out, grad_lse, out, lse, *saved) -> (grad_query, grad_key,
            grad_value[, grad_attn_mask[, grad_sinks]])`. A gradient is wanted for `attn_mask` and `sinks`
            where the tensor's `requires_grad` says so. `grad_lse` is None unless lse has a gradient.
        partial_backward: `partial_backward(params, grad_out, out, lse) -> (grad_query, grad_key, grad_value)`, for a
            composite kernel without `backward`: the gradients of a call whose keys are only a part of all, from `out`
            and `lse` over all of them. `attnplug.parallel` asks; a `backward` that computes with the `out` and `lse`
            that it is given does the same already.
        supports: `supports(params) -> reason, reasons or None`: what `Capabilities` cannot say. An empty
            answer accepts. What depends on the GPU asks `attnplug.compute_capability`.
        unavailable: `unavailable() -> reason or None`: what keeps every call from running here, and shows only
            once the kernel is imported: an operator of PyTorch's that has changed, a compiler that is missing.
            Asked when it is activated, and with each decision.
        lacks: `lacks(device, dtype) -> {Feature: reason}`: the declared features that this machine, its libraries or
            that device, does not have for that dtype. A call that asks for one is declined with the reason, and so
            are the checks of the conformance kit about it.
        notes: `notes(params) -> text, texts or None`: what is worth knowing of a call that it takes, such as which of
            several kernels runs it, and why. `explain` shows it; nothing else asks.
        composite: forward is made of differentiable PyTorch operators, so `torch.compile` traces through
            it and, where there is no `backward`, autograd differentiates it.
        shape_dependent: `supports` looks at lengths, batch or strides; its answer is then kept for each
            shape, rather than for each combination of dtype, device, head sizes and features.
        any_form: forward takes dense calls as PyTorch's function does, of any rank and with broadcasting, and
            is given them as the user wrote them, as every kernel is given nested tensors.
        plain: `plain(query, key, value, attn_mask, dropout, is_causal, scale, enable_gqa) -> (out, lse)`: what forward
            returns for a call that asks for nothing beyond PyTorch's arguments and, where it has no mask, an lse, with
            no record to build. `attn_mask` has two to four dimensions that broadcast; `scale` may be None; the last
            stride of each tensor but the mask is 1; and autocast, for which they are cast already, may be on. Only
            attnplug's own kernels, whose results are not checked, are called in this way; `prepare` is for all.
        prepare: `prepare(params) -> run or None`: given a call without mask or anything beyond PyTorch's arguments and
            an lse, returns a function for calls that repeat it. `run(query, key, value) -> (out, lse, *saved)` does
            what forward does for a call that differs only in where its tensors lie in memory: same shapes, strides,
            dtype, device, scale. Unless `params.needs_grad`, `saved` may be left out. Unless `params.return_lse`, lse
            may be None; backward then gets None. It returns None to have forward called, as it must where it depends on
            alignment or on a setting that has changed. `params` must not be kept. It is asked at the first call of its
            kind, for other shapes and strides when they come a second time, and at once when several did, as in a
            decode loop. It saves looking up a plan, building the `SDPAParams` and checking the output. Calls with a
            mask are prepared for by attnplug's own kernels alone, whose `run` gets it as a fourth argument.
        prepare_packed: `prepare_packed(params) -> run or None`: the same for a call of packed sequences, of a kernel
            that is not `shape_dependent`. It is first asked at the second call of its kind. Its `run(query, key, value,
            cu_seq_q, cu_seq_k, sinks, alibi_slopes, seqused_k, block_table) -> (out, lse, *saved)` gets None for those
            that the call does not have. `max_q` and `max_k` are the same each time; which lengths and pages the tensors
            hold is not, and must be read from those that `run` is given.
        prepare_backward: `prepare_backward(params, grad_out, out, lse, *saved) -> run or None`: the same for backward
            of what `prepare` or `prepare_packed` gave a function for, where nothing asks for a gradient through lse.
            `run(query, key, value, grad_out, out, lse, *saved)` returns what backward does for tensors that differ from
            these only in where they lie in memory; as in backward, `requires_grad` of those in `params` says which
            gradients are wanted. Of packed sequences (`params.is_varlen`) it is given all that the other `run` is given
            in place of the first three. It returns None to have backward called. No tensor must be kept.
        fake: `fake(params) -> (out, lse, *saved)`, empty tensors with the shapes, dtypes and strides that
            forward returns. Only `torch.compile` asks, and only for a kernel that is not composite. With it
            `saved` reaches backward through the graph (and must hold no None); without it, a compiled backward
            runs forward once more if forward saves anything, and `out` is copied if it is not contiguous.
        family: `family(params) -> SDPBackend or None`: what a kernel that delegates really runs, for
            `record()`.
        register_fn: for providers of `torch.nn.attention`: called on activation, it overrides PyTorch's
            operators and may return a handle whose `remove()` undoes that. The kernel runs only while it is active.
    """

    forward: Callable[[SDPAParams], Any]
    backward: Callable[..., Any] | None = None
    partial_backward: Callable[..., Any] | None = None
    supports: Callable[[SDPAParams], Reasons] | None = None
    unavailable: Callable[[], Reasons] | None = None
    lacks: Callable[[torch.device, torch.dtype], Mapping[Feature, str]] | None = None
    notes: Callable[[SDPAParams], Reasons] | None = None
    composite: bool = False
    shape_dependent: bool = False
    any_form: bool = False
    plain: Callable[..., Any] | None = None
    prepare: Callable[[SDPAParams], Callable[..., Any] | None] | None = None
    prepare_packed: Callable[[SDPAParams], Callable[..., Any] | None] | None = None
    prepare_backward: Callable[..., Callable[..., Any] | None] | None = None
    fake: Callable[[SDPAParams], Any] | None = None
    family: Callable[[SDPAParams], Any] | None = None
    register_fn: Callable[[], Any] | None = None

    @property
    def differentiable(self) -> bool:
        """Whether a call that needs gradients can run here."""
        return self.composite or self.backward is not None

    def faults(self) -> tuple[str, ...]:
        """Return the reasons of `unavailable`; none means that some call may run here."""
        return _reasons("unavailable", self.unavailable)

    def missing(self, asked: Collection[Feature], device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
        """Return the reasons of `lacks` about the features that are asked for."""
        if self.lacks is None:
            return ()
        try:
            lacking = {Feature(feature): str(reason) for feature, reason in self.lacks(device, dtype).items()}
        except BaseException as error:  # as with `supports`
            if is_stop(error):
                raise
            return (f"lacks() raised {of_error(error)}",)
        return tuple(reason for feature, reason in lacking.items() if feature in asked)

    def refusals(self, params: SDPAParams) -> tuple[str, ...]:
        """Return the reasons of `unavailable` and `supports` for declining `params`; none means accepted."""
        return self.faults() or _reasons("supports", self.supports, params)

    def remarks(self, params: SDPAParams) -> tuple[str, ...]:
        """Return what `notes` says of a call that is accepted."""
        return _reasons("notes", self.notes, params)


class OfOneRank:
    """Base class of kernels that compute what one of several ranks has of a call: no other kernel could give that."""


def _reasons(role: str, function: Callable[..., Reasons] | None, *arguments: SDPAParams) -> tuple[str, ...]:
    """Ask a function of the author's for reasons, or notes, and take it for one if it fails."""
    if function is None:
        return ()
    try:
        answer = function(*arguments)
    except BaseException as error:  # a call that does not need this kernel must not see its mistakes
        if is_stop(error):
            raise
        return (f"{role}() raised {of_error(error)}",)
    if answer is None or isinstance(answer, str):
        return (printable(answer),) if answer else ()
    if isinstance(answer, (list, tuple)):
        return tuple(printable(reason) for reason in answer)
    return (printable(f"{role}() returned {answer!r}; expected a reason, several, or None for none"),)


_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "forward": ("params",),
    "backward": ("params", "grad_out", "grad_lse", "out", "lse"),
    "partial_backward": ("params", "grad_out", "out", "lse"),
    "supports": ("params",),
    "unavailable": (),
    "lacks": ("device", "dtype"),
    "notes": ("params",),
    "plain": ("query", "key", "value", "attn_mask", "dropout", "is_causal", "scale", "enable_gqa"),
    "prepare": ("params",),
    "prepare_packed": ("params",),
    "prepare_backward": ("params", "grad_out", "out", "lse"),
    "fake": ("params",),
    "family": ("params",),
    "register_fn": (),
}
_FLAGS = ("composite", "shape_dependent", "any_form")
_DEFAULTS = {field.name: field.default for field in fields(Kernel)}


def load_kernel(spec: ImplSpec) -> Kernel:
    """Import what `spec.kernel` names and return its functions.

    Raises:
        SpecError: it has no forward, one of its attributes is not as documented, or is nearly called so.
        Exception: whatever the import raises.
    """
    target = _import(spec.name, spec.kernel) if isinstance(spec.kernel, str) else spec.kernel
    where = f"ImplSpec {spec.name!r}.kernel"
    if isinstance(target, Kernel):
        kernel = target
    else:
        _refuse_misspelt(where, target)
        forward = getattr(target, "forward", target)
        if not callable(forward):
            raise SpecError(f"{where}: {spec.kernel!r} is not callable and has no forward")
        given: dict[str, Any] = {
            name: getattr(target, name, default) for name, default in _DEFAULTS.items() if name != "forward"
        }
        kernel = Kernel(forward=forward, **given)
    for flag in _FLAGS:
        if not isinstance(getattr(kernel, flag), bool):
            raise SpecError(f"{where}: {flag} is {getattr(kernel, flag)!r}; expected True or False")
    for role, arguments in _ARGUMENTS.items():
        _check_signature(where, role, getattr(kernel, role), arguments)
    return kernel


def _refuse_misspelt(where: str, target: Any) -> None:
    """Raise if the author defined something that would be ignored, and whose name is nearly that of an attribute.

    It is taken for one if its first letter is right, at most one letter is missing or too many, it is what the
    attribute would be, a function or a flag, and the attribute itself is not there: beside `supports`, `support` may
    be anything.
    """
    for name, value in _own_attributes(target):
        if name in _DEFAULTS:
            continue
        for meant in _DEFAULTS:
            if hasattr(target, meant) or not _is_near(name, meant):
                continue
            if callable(value) if meant in _ARGUMENTS else isinstance(value, (bool, int, str)):
                raise SpecError(
                    f"{where}: {name!r} is not an attribute of a kernel; did you mean {meant!r}? (A helper may begin "
                    f"with an underscore.) Known: {', '.join(_DEFAULTS)}"
                )


def _own_attributes(target: Any) -> Iterator[tuple[str, Any]]:
    """Return the public attributes that the author defined on a kernel, without those that a module imported."""
    for owner in (target,) if isinstance(target, (ModuleType, type)) else (target, type(target)):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            imported = isinstance(owner, ModuleType) and (
                isinstance(value, ModuleType) or getattr(value, "__module__", owner.__name__) != owner.__name__
            )
            if not name.startswith("_") and not imported:
                yield name, value


def _is_near(name: str, meant: str) -> bool:
    one, other = (text.lower().replace("_", "") for text in (name, meant))
    if len(other) <= len("plain"):  # `plan` is a word of its own
        return one == other
    return (
        one[:1] == other[:1]
        and abs(len(one) - len(other)) <= 1
        and difflib.SequenceMatcher(None, one, other).ratio() >= 0.86
    )


def _import(name: str, path: str) -> Any:
    module, _, attributes = path.partition(":")
    where = f"ImplSpec {name!r}.kernel: {path!r} does not resolve"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # not the kernel's module, but one that it imports
            raise
        fix = "write 'package.module' or 'package.module:object'"
        raise ModuleNotFoundError(f"{where}: {error}; {fix}", name=error.name) from error
    for attribute in attributes.split(".") if attributes else ():
        if not hasattr(found, attribute):
            raise AttributeError(f"{where}: {module} has no {attribute!r}{did_you_mean(attribute, dir(found))}")
        found = getattr(found, attribute)
    return found


def _check_signature(where: str, role: str, function: Any, arguments: tuple[str, ...]) -> None:
    if function is None and role != "forward":
        return
    if not callable(function):
        raise SpecError(f"{where}: {role} is {function!r}, which is not callable")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions may have none
        return
    try:
        # backward gets more than these: the tensors that forward saves
        (signature.bind_partial if role in ("backward", "prepare_backward") else signature.bind)(*arguments)
    except TypeError as error:
        called = f"{role}({', '.join(arguments)})"
        raise SpecError(f"{where}: {role}{signature} cannot be called as {called}: {error}{_place(function)}") from None


def _place(function: Any) -> str:
    """Return where a function is defined, if it is one of Python's."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" (in {code.co_filename}, line {code.co_firstlineno})" if code else ""
