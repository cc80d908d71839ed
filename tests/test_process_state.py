"""What fails a test that leaves the process changed sees each kind of change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import attnplug
from process_state import differences, forget, snapshot


def bound(stack: ExitStack, _: pytest.MonkeyPatch) -> None:
    module = torch.nn.Identity()
    handle = attnplug.bind(module, "torch")
    stack.callback(lambda _: handle.remove(), module)  # which is bound for as long as it is there


def registered(stack: ExitStack, _: pytest.MonkeyPatch) -> None:
    attnplug.register_impl(attnplug.ImplSpec(name="left", kernel=lambda params: None, backend=None))
    stack.callback(attnplug.unregister_impl, "left")


def overridden(stack: ExitStack, _: pytest.MonkeyPatch) -> None:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention_for_cpu", lambda *args, **kwargs: None, "CPU")
    stack.callback(library._destroy)


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def entered(context: Callable[[], Any]) -> Callable[..., None]:
    return lambda stack, _: stack.enter_context(context())


CHANGES: dict[str, tuple[Callable[[ExitStack, pytest.MonkeyPatch], Any], str]] = {
    "a scope": (entered(lambda: attnplug.sdpa_kernel("aten_math")), "attnplug's thread.scope"),
    "a recording": (entered(attnplug.record), "attnplug's thread.watchers"),
    "a patch": (entered(attnplug.patch_torch), "F.scaled_dot_product_attention"),
    "a bound module": (bound, "attnplug's process.bindings"),
    "an implementation": (registered, "registered implementations"),
    "an operator": (overridden, "kernels of aten::_scaled_dot_product_flash_attention_for_cpu"),
    "a dtype": (entered(double), "default dtype"),
    "no gradients": (entered(torch.no_grad), "grad mode"),
    "a variable": (lambda _, patch: patch.setenv("ATTNPLUG_IMPL", "torch"), "os.environ['ATTNPLUG_IMPL']"),
}


def test_what_inductor_sets_at_its_first_kernel_for_a_gpu_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    before = snapshot()
    monkeypatch.setenv("TRITON_CACHE_DIR", "where Inductor's kernels are")
    assert differences(before, snapshot()) == []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_what_is_left_behind_is_named(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, name = CHANGES[change]
    before = snapshot()
    with ExitStack() as stack:
        make(stack, monkeypatch)
        assert any(line.startswith(f"{name} was ") for line in differences(before, snapshot()))
    monkeypatch.undo()
    assert differences(before, snapshot()) == []


def test_what_dynamo_gives_up_is_not_given_up_for_the_tests_to_come() -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda query: query + 1, backend=counter, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (2, 3, 4):
            compiled(torch.ones(length))
        assert counter.frame_count == 1
        forget()
        compiled(torch.ones(4))
    assert counter.frame_count == 2


def test_what_is_said_once_is_said_to_the_tests_to_come_too() -> None:
    query = torch.ones(1, 1, 2, 4)
    attnplug.activate_flash_attention_impl("aten_math")
    for _ in range(2):
        for expected in (1, 0):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                attnplug.scaled_dot_product_attention(query, query, query, return_lse=True)
            assert [each.category for each in said] == [attnplug.FallbackWarning] * expected
        forget()
