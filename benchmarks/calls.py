"""What one eager call costs beyond the function that a user would call instead, with tiny tensors, on every route.

"Bare" is the function or operator that the chosen implementation ends in, called directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnplug
import harness
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend, sdpa_kernel
from harness import Result, alternate

ours = attnplug.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention
flash = torch._scaled_dot_product_flash_attention_for_cpu
formula = torch._scaled_dot_product_attention_math

Call = Callable[[], Any]


def measure(quick: bool) -> Iterator[Result]:
    if os.environ.get("ATTNPLUG_IMPL"):  # the child that `by_environment` starts
        yield from compare("named by the environment / bare", (1.5, 1.2), plain(ours), plain(flash), quick)
        return
    torch.set_num_threads(1)
    with torch.no_grad():
        yield from by_default(quick)
        yield from by_name(quick)
        yield from under_autocast(quick)
        yield from packed(quick)
    yield from by_environment(quick)
    yield from training(quick)


def tensors(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 1, 2, 8, 16, **options)
    return query, key, value


def plain(function: Callable[..., Any], *more: Any, **options: Any) -> Call:
    query, key, value = tensors()
    return lambda: function(query, key, value, *more, **options)


def by_default(quick: bool) -> Iterator[Result]:
    query, key, value = tensors()
    three, mask = (query[0], key[0], value[0]), torch.zeros(8, 8)
    limits = 1.3, 1.15
    yield from compare("default / F.sdpa", limits, plain(ours), plain(theirs), quick)
    yield from compare("default, 3-D / F.sdpa", limits, lambda: ours(*three), lambda: theirs(*three), quick)
    yield from compare("default, mask / F.sdpa", limits, plain(ours, mask), plain(theirs, mask), quick)
    yield from compare("default, return_lse / bare", (1.5, 1.2), plain(ours, return_lse=True), plain(flash), quick)
    yield from compare("default, recorded / F.sdpa", (2, 1.5), plain(ours), plain(theirs), quick, recording)
    with attnplug.patch_torch():
        patched = torch.nn.functional.scaled_dot_product_attention
        yield from compare(
            "patched F.sdpa, nothing selected / F.sdpa", (1.3, 1.15), plain(patched), plain(theirs), quick
        )


@contextmanager
def recording() -> Iterator[None]:
    with attnplug.record() as calls:
        yield
    calls.clear()


def by_name(quick: bool) -> Iterator[Result]:
    query, key, value = tensors()
    three, mask = (query[0], key[0], value[0]), torch.zeros(8, 8)
    four = mask[None, None]
    limits = 1.5, 1.2
    yield from compare("impl='aten_flash' / bare", limits, plain(ours, impl="aten_flash"), plain(flash), quick)
    yield from compare(
        "impl='aten_flash', 3-D / F.sdpa",
        limits,
        lambda: ours(*three, impl="aten_flash"),
        lambda: theirs(*three),
        quick,
    )
    yield from compare(
        "impl='aten_math', mask / bare", limits, plain(ours, mask, impl="aten_math"), plain(formula, four), quick
    )
    yield from compare("impl='torch' / F.sdpa", (1.3, 1.15), plain(ours, impl="torch"), plain(theirs), quick)
    scope = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    yield from compare("scope FLASH_ATTENTION / bare", limits, plain(ours), plain(flash), quick, scope)
    attnplug.activate_flash_attention_impl("aten_flash")
    try:
        followed = torch.nn.functional.scaled_dot_product_attention
        yield from compare("active aten_flash / bare", limits, plain(ours), plain(flash), quick)
        yield from compare("F.sdpa while aten_flash is active / bare", (1.6, 1.3), plain(followed), plain(flash), quick)
    finally:
        attnplug.restore_flash_attention_impl()


def under_autocast(quick: bool) -> Iterator[Result]:
    half = tensors(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        yield from compare("default, autocast / F.sdpa", (1.3, 1.15), lambda: ours(*half), lambda: theirs(*half), quick)
        yield from compare(
            "impl='aten_flash', autocast / bare under autocast",
            (1.5, 1.2),
            lambda: ours(*half, impl="aten_flash"),
            lambda: flash(*half),
            quick,
        )


class Nothing:
    """A kernel that takes no time."""

    results = torch.empty(8, 2, 16), torch.empty(2, 8)

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Tensor, Tensor]:
        return cls.results


def packed(quick: bool) -> Iterator[Result]:
    """Yield what `varlen_attn` takes beyond the kernel's own time, for two sequences of four."""
    capabilities = Capabilities(features=set(Feature))
    attnplug.register_impl(ImplSpec(name="nothing", kernel=Nothing, backend=None, capabilities=capabilities))
    tokens, starts = torch.randn(8, 2, 16), torch.tensor([0, 4, 8], dtype=torch.int32)
    call = partial(attnplug.varlen_attn, tokens, tokens, tokens, starts, starts, 4, 4, impl="nothing")
    times = alternate({"varlen_attn": call}, 3 if quick else 400, 100)
    attnplug.unregister_impl("nothing")
    yield Result("varlen_attn beyond its kernel", times.microseconds("varlen_attn"), "us", 15, 5)


def by_environment(quick: bool) -> Iterator[Result]:
    """Yield the same of an implementation that ATTNPLUG_IMPL names, which an interpreter of its own must read."""
    program = "import calls, harness, sys; print(harness.as_json(calls.measure('--quick' in sys.argv)))"
    done = subprocess.run(
        [sys.executable, "-c", program, *["--quick"] * quick],
        env=os.environ | {"ATTNPLUG_IMPL": "aten_flash"},
        cwd=os.path.dirname(os.path.abspath(__file__)),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    yield from harness.from_json(done.stdout)


def training(quick: bool) -> Iterator[Result]:
    query, grad = tensors()[0].requires_grad_(), tensors()[0]

    def step(function: Callable[..., Any], **options: Any) -> Call:
        return lambda: torch.autograd.grad(function(query, query, query, **options), query, grad)

    limits = 1.1, 1.05
    yield from compare("forward and backward, default / F.sdpa", limits, step(ours), step(theirs), quick)
    yield from compare(
        "forward and backward, aten_flash / F.sdpa", limits, step(ours, impl="aten_flash"), step(theirs), quick
    )


def compare(
    name: str,
    limits: tuple[float, float],
    one: Call,
    other: Call,
    quick: bool,
    inside: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Iterator[Result]:
    """Yield how much longer `one` takes than `other`."""
    candidates: Mapping[str, Call] = {"one": one, "other": other}
    times = alternate(candidates, 3 if quick else 400, 100, {"one": inside} if inside is not None else None)
    details = {
        "us": times.microseconds("one"),
        "of it": times.microseconds("other"),
        "adds": times.added("one", "other"),
    }
    yield Result(name, times.ratio("one", "other"), "ratio", *limits, details)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
