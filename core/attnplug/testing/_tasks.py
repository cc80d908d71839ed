"""One check as a message to a worker process, and what becomes of the device in it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import torch

import attnplug
from attnplug import ImplSpec
from attnplug._registry.discovery import get_registry
from attnplug._registry.registry import PROGRAM
from attnplug.testing._checks import Check
from attnplug.testing._report import FAILED, Result
from attnplug.testing._running import find, run_check
from attnplug.testing._subject import Subject
from attnplug.testing.checks import all_checks


@dataclass(frozen=True)
class Task:
    """One check of one implementation, device and dtype.

    Attributes:
        spec: of an implementation that only the asking program has registered.
        piece: the number of a piece of the check, and of how many.
    """

    impl: str
    check: str
    device: str
    dtype: str
    full: bool
    spec: ImplSpec | None = None
    piece: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, check: Check, subject: Subject) -> Task:
        """Return the task of making `check` for `subject`.

        Raises:
            ValueError: a program registered the implementation, and its kernel cannot be sent to another process.
        """
        spec = _spec_to_send(subject.name)
        return cls(subject.name, check.name, subject.device, subject.dtype, subject.full, spec, subject.piece)

    def run(self) -> tuple[Result, bool]:
        """Make the check here; return its result, and whether it has cost this process the device."""
        if self.spec is not None and self.impl not in get_registry():
            attnplug.register_impl(self.spec)
        (check,) = (each for each in all_checks() if each.name == self.check)
        result = run_check(check, Subject(find(self.impl), self.device, self.dtype, self.full, piece=self.piece))
        if not (words := lost(self.device)):
            return result, False
        reason = f"{result.reason or 'passed, but'}\nafter it the device cannot be used: {words}"
        return replace(result, status=FAILED, reason=reason), True

    def failed(self, reason: str, seconds: float) -> Result:
        """Return the result of a check that ended its process."""
        claims = {check.name: check.claim for check in all_checks()}
        return Result(self.check, self.dtype, FAILED, reason, (), claims[self.check], seconds)


def lost(device: str) -> str:
    """Return what the driver says if the device cannot be used any more in this process; else an empty string.

    A kernel's fault shows at the next call that waits for it, and ends the context: all later calls fail.
    """
    try:
        torch.get_device_module(device).synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return ""
    except Exception as error:  # a driver's faults have classes of their own
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _spec_to_send(impl: str) -> ImplSpec | None:
    entry = get_registry().get(impl)
    if entry.distribution != PROGRAM:
        return None
    try:
        pickle.dumps(entry.spec)
    except Exception as error:  # whatever `__reduce__` of a kernel raises
        raise ValueError(
            f"workers: {impl!r} is registered by this program, and its kernel cannot be sent to another process "
            f"({type(error).__name__}: {error}); give ImplSpec.kernel as 'package.module', or use workers=0"
        ) from error
    return entry.spec
