"""What it costs to enter and leave a scope, and to activate and restore an implementation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import attention

import attnplug
import harness
from attnplug import SDPBackend
from harness import Result, alternate

LIMIT, AIM = 0.15, 0.05


def measure(quick: bool) -> Iterator[Result]:
    turns = 3 if quick else 500
    math, flash = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
    their_math, their_flash = attention.SDPBackend.MATH, attention.SDPBackend.FLASH_ATTENTION
    attnplug.list_impls()
    candidates = {
        "PyTorch's, one family": scope(lambda: attention.sdpa_kernel(their_math)),
        "one family": scope(lambda: attnplug.sdpa_kernel(math)),
        "one name": scope(lambda: attnplug.sdpa_kernel("aten_flash")),
        "PyTorch's, two families": scope(lambda: attention.sdpa_kernel([their_flash, their_math])),
        "two families": scope(lambda: attnplug.sdpa_kernel([flash, math])),
        "PyTorch's, priority": scope(lambda: attention.sdpa_kernel([their_flash, their_math], set_priority=True)),
        "priority": scope(lambda: attnplug.sdpa_kernel([flash, math], set_priority=True)),
    }
    times = alternate(candidates, turns, 50)
    theirs = {"two families": "PyTorch's, two families", "priority": "PyTorch's, priority"}
    for name in ("one family", "one name", "two families", "priority"):
        to = theirs.get(name, "PyTorch's, one family")
        details = {"us": times.microseconds(name), "of it": times.microseconds(to)}
        yield Result(
            f"enter and leave a scope of {name} / PyTorch's", times.ratio(name, to), "ratio", LIMIT, AIM, details
        )
    yield from switching(turns=2 if quick else 50)


def scope(make: Callable[[], Any]) -> Callable[[], None]:
    def enter_and_leave() -> None:
        with make():
            pass

    return enter_and_leave


def switching(turns: int) -> Iterator[Result]:
    """Yield what switching costs; most of it is the search for modules that hold PyTorch's function."""

    def activate() -> None:
        attnplug.activate_flash_attention_impl("aten_flash")

    @contextmanager
    def restored_after() -> Iterator[None]:
        yield
        attnplug.restore_flash_attention_impl()

    @contextmanager
    def activated_before() -> Iterator[None]:
        activate()
        yield

    def patch() -> None:
        attnplug.patch_torch().remove()

    attention.register_flash_attention_impl("benchmark", register_fn=Handle)

    def their_switch() -> None:
        attention.activate_flash_attention_impl("benchmark")
        attention.restore_flash_attention_impl()

    candidates = {
        "activate": activate,
        "restore": attnplug.restore_flash_attention_impl,
        "patch_torch and remove": patch,
        "PyTorch's activate and restore, with a provider that does nothing": their_switch,
    }
    inside = {"activate": restored_after, "restore": activated_before}
    times = alternate(candidates, turns, 1, inside)
    for name in candidates:
        yield Result(name, times.microseconds(name) / 1e3, "ms", details={"modules": len(sys.modules)})


class Handle:
    """What PyTorch wants from a provider."""

    def remove(self) -> None:
        """Nothing was registered."""


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
