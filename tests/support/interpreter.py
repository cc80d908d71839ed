"""Triton's interpreter for flash_triton's tests, in half its time; run by itself, the conformance kit in it.

Triton decides between compiler and interpreter when kernels are defined, so whatever is interpreted needs a process
of its own: `TRITON_INTERPRET=1 python tests/support/interpreter.py float32` prints as JSON what a quick run for all of
DTYPES says of float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACKAGE = "attnplug_flash_triton"
DTYPES = ["float16", "float32"]


@contextmanager
def patched_once() -> Iterator[None]:
    """Keep Triton's interpreter from patching its language again for each call of a device function.

    It has been patched for the kernel that calls, and doing so takes half of all the time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    patched = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith(PACKAGE)
        return self.rewrite()(*args, **kwargs) if ours else patched(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
    try:
        yield
    finally:
        InterpretedFunction.__call__ = patched


def main(dtype: str) -> None:
    from attnplug.testing import all_checks, check_impl

    checks = [check.name for check in all_checks() if dtype in check.dtypes_of(DTYPES, "quick")]
    with patched_once():
        report = check_impl("flash_triton", device="cpu", dtype=dtype, checks=checks)
    json.dump(report.as_dict(), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
