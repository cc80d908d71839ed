"""Triton's interpreter for flash_triton's tests, in a third of its time; run by itself, the conformance kit in it.

Triton decides between compiler and interpreter when kernels are defined, so whatever is interpreted needs a process
of its own: `TRITON_INTERPRET=1 python tests/support/interpreter.py float32` prints as JSON what a quick run for all of
DTYPES says of float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

PACKAGE = "attnplug_flash_triton"
DTYPES = ["float16", "float32"]


@contextmanager
def quickened(package: str = PACKAGE) -> Iterator[None]:
    """Keep Triton's interpreter, for kernels of a package, from what takes most of its time and changes no result.

    It patches its language again for each call of a device function: for ours it has done so when the kernel was
    launched, and what it has patched for its own stays so. It computes whether each sum and product of whole numbers
    overflows, for an assertion that it makes with `debug` alone. It lists all dtypes whenever it looks for one. And of
    each tensor, and its type, it works out anew what those of the same type and shape have in common.
    """
    from triton import language
    from triton.runtime import interpreter

    before = (
        (interpreter.InterpretedFunction, "__call__", patched := interpreter.InterpretedFunction.__call__),
        (interpreter.interpreter_builder, "options", options := interpreter.interpreter_builder.options),
        (interpreter, "_get_np_dtype", find := interpreter._get_np_dtype),
        (language.tensor, "__init__", begin_tensor := language.tensor.__init__),
        (language.block_type, "__init__", begin_type := language.block_type.__init__),
    )
    known, found = cache(find), set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith(package) or module in found:
            return self.rewrite()(*args, **kwargs)
        result = patched(self, *args, **kwargs)
        if module.startswith("triton.language."):
            found.add(module)
        return result

    tensors: dict[str, dict[str, Any]] = {}
    types: dict[tuple[Any, ...], dict[str, Any]] = {}

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        name = str(type)
        if name in tensors:
            vars(self).update(tensors[name], handle=handle, type=type)
            return
        begin_tensor(self, handle, type)
        tensors[name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}

    def new_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (str(element_ty), *shape)
        if not all(type(size) is int for size in key[1:]):
            begin_type(self, element_ty, shape)
        elif key in types:
            vars(self).update(types[key])
        else:
            begin_type(self, element_ty, shape)
            types[key] = dict(vars(self))

    language.tensor.__init__ = new_tensor
    language.block_type.__init__ = new_type
    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._get_np_dtype = lambda dtype: (known if type(dtype) is language.dtype else find)(dtype)
    try:
        yield
    finally:
        for each in before:
            setattr(*each)


def main(dtype: str) -> None:
    from attnplug.testing import all_checks, check_impl

    checks = [check.name for check in all_checks() if dtype in check.dtypes_of(DTYPES, "quick")]
    with quickened():
        report = check_impl("flash_triton", device="cpu", dtype=dtype, checks=checks)
    json.dump(report.as_dict(), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
