"""From an `ImplSpec`'s `kernel` to the functions that run, checked where the author can still be named.

A kernel is imported when it is first chosen, because a broken CUDA build must break neither
`import attnplug` nor any call that does not need it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnplug._errors import SpecError, did_you_mean
from attnplug._types import ImplSpec, SDPAParams

Reasons = str | Sequence[str] | None


@dataclass(frozen=True)
class Kernel:
    """The functions of a kernel. An author writes a module or an object with attributes of these names.

    Attributes:
        forward: `forward(params) -> (out, lse, *saved)`. `out` has the query's dtype; `lse` is float32
            (float64 for float64 inputs), or None where the kernel gives none; `saved` are the tensors
            that backward needs besides.
        backward: `backward(params, grad_out, grad_lse, out, lse, *saved) -> (grad_query, grad_key,
            grad_value[, grad_attn_mask[, grad_sinks]])`. A gradient is wanted for `attn_mask` and `sinks`
            where the tensor's `requires_grad` says so. `grad_lse` is None unless someone asked.
        supports: `supports(params) -> reason, reasons or None`: what `Capabilities` cannot say. An empty
            answer accepts. What depends on the card asks `attnplug.compute_capability`.
        unavailable: `unavailable() -> reason or None`: what keeps every call from running here, and shows only
            once the kernel is imported: an operator of PyTorch's that has changed, a compiler that is missing.
            Asked when it is activated, and with each decision.
        composite: forward is made of differentiable PyTorch operators, so `torch.compile` traces through
            it and, where there is no `backward`, autograd differentiates it.
        shape_dependent: `supports` looks at lengths, batch or strides; its answer is then kept for each
            shape, rather than for each combination of dtype, device, head sizes and features.
        any_form: forward takes dense calls as PyTorch's function does, of any rank and with broadcasting, and
            is given them as the user wrote them, as every kernel is given nested tensors.
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
    supports: Callable[[SDPAParams], Reasons] | None = None
    unavailable: Callable[[], Reasons] | None = None
    composite: bool = False
    shape_dependent: bool = False
    any_form: bool = False
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

    def refusals(self, params: SDPAParams) -> tuple[str, ...]:
        """Return the reasons of `unavailable` and `supports` for declining `params`; none means accepted."""
        return self.faults() or _reasons("supports", self.supports, params)


def _reasons(role: str, function: Callable[..., Reasons] | None, *arguments: SDPAParams) -> tuple[str, ...]:
    """Ask a function of the author's for reasons, and take it for one if it fails."""
    if function is None:
        return ()
    try:
        answer = function(*arguments)
    except Exception as error:  # a call that does not need this kernel must not see its mistakes
        return (f"{role}() raised {type(error).__name__}: {error}",)
    if answer is None or isinstance(answer, str):
        return (answer,) if answer else ()
    if isinstance(answer, (list, tuple)):
        return tuple(str(reason) for reason in answer)
    return (f"{role}() returned {answer!r}, which is neither reasons nor None",)


def load_kernel(spec: ImplSpec) -> Kernel:
    """Import what `spec.kernel` names and return its functions.

    Raises:
        SpecError: it has no forward, or one of its functions cannot be called as documented.
        Exception: whatever the import raises.
    """
    target = _import(spec.name, spec.kernel) if isinstance(spec.kernel, str) else spec.kernel
    if isinstance(target, Kernel):
        return target
    forward = getattr(target, "forward", target)
    if not callable(forward):
        raise SpecError(f"ImplSpec {spec.name!r}.kernel: {spec.kernel!r} is no function and has no forward")
    kernel = Kernel(
        forward=forward,
        backward=getattr(target, "backward", None),
        supports=getattr(target, "supports", None),
        unavailable=getattr(target, "unavailable", None),
        composite=bool(getattr(target, "composite", False)),
        shape_dependent=bool(getattr(target, "shape_dependent", False)),
        any_form=bool(getattr(target, "any_form", False)),
        fake=getattr(target, "fake", None),
        family=getattr(target, "family", None),
        register_fn=getattr(target, "register_fn", None),
    )
    _check_signature(spec, "forward", kernel.forward, ("params",))
    _check_signature(spec, "supports", kernel.supports, ("params",))
    _check_signature(spec, "unavailable", kernel.unavailable, ())
    _check_signature(spec, "fake", kernel.fake, ("params",))
    _check_signature(spec, "backward", kernel.backward, ("params", "grad_out", "grad_lse", "out", "lse"))
    return kernel


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


def _check_signature(spec: ImplSpec, role: str, function: Any, arguments: tuple[str, ...]) -> None:
    if function is None:
        return
    where = f"ImplSpec {spec.name!r}.kernel: {role}"
    if not callable(function):
        raise SpecError(f"{where} is {function!r}, which cannot be called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions may have none
        return
    try:
        # backward gets more than these: the tensors that forward saves
        (signature.bind_partial if role == "backward" else signature.bind)(*arguments)
    except TypeError as error:
        raise SpecError(f"{where}{signature} cannot be called as {role}({', '.join(arguments)}): {error}") from None
