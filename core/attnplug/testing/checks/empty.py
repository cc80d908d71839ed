"""Calls with nothing in them, which attnplug answers itself."""

from __future__ import annotations

from attnplug.testing._call import compare
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject


@check()
def check_empty_inputs(subject: Subject) -> None:
    """No sequences, no heads, no queries or no keys: what the formulas say, and supports can be asked about it."""
    for empty in ({"batch": 0}, {"heads": 0}, {"queries": 0}, {"keys": 0}):
        call = subject.call(**empty, gradients=subject.gradients)
        subject.refusals(call)  # the call needs no kernel, but `can_use_impl` asks the kernel's supports
        compare(subject.name, call)
        subject.ran += 1
