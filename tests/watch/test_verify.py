"""What `verify` compares, says, and leaves alone."""

from __future__ import annotations

import gc
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnplug
import process_state
from attnplug import Mismatch, MismatchError, MismatchWarning
from spoiled_kernels import Formula, WrongGradient, WrongLse, WrongOut, register, tensors


@pytest.mark.parametrize("impl", [None, "torch", "aten_flash", "aten_math", "math_ref"])
def test_right_results_are_counted_and_nothing_else_happens(impl: str | None) -> None:
    query, key, value = tensors()
    plain = attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, impl=impl)
    with attnplug.verify(1.0) as watched:
        out = attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, impl=impl)
    assert torch.equal(out, plain)
    assert (watched.calls, watched.results, watched.wrong, watched.mismatches) == (1, 1, 0, [])


CALLS: dict[str, dict[str, Any]] = {
    "windows": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "lower right": {"is_causal": True, "causal_variant": attnplug.CausalVariant.LOWER_RIGHT},
    "used": {"seqused_k": torch.tensor([3], dtype=torch.int32)},
    "a mask of two dimensions": {"attn_mask": torch.ones(5, 9).tril(2).bool()},
    "an additive mask": {"attn_mask": torch.arange(45.0).reshape(5, 9) / 45},
    "scale": {"scale": -0.5},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_whatever_a_call_asks_for_is_verified(name: str) -> None:
    query, key, value = tensors(5, 9)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.scaled_dot_product_attention(query, key, value, **CALLS[name])
    assert (watched.results, dict(watched.skipped)) == (1, {})


def test_grouped_heads_three_dimensions_and_broadcasting_are_verified() -> None:
    query = torch.randn(2, 4, 5, 8)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.scaled_dot_product_attention(query, query[:, :2], query[:, :2], enable_gqa=True)
        attnplug.scaled_dot_product_attention(query[0], query[0], query[0])
        attnplug.scaled_dot_product_attention(query, query[:1], query[:1])
    assert (watched.results, dict(watched.skipped)) == (3, {})


def test_sequences_of_different_lengths_and_pages_are_verified() -> None:
    packed, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    pages = torch.randn(3, 8, 2, 8)
    used, table = torch.tensor([5, 8], dtype=torch.int32), torch.tensor([[2], [0]], dtype=torch.int32)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, is_causal=True, return_lse=True)
        attnplug.varlen_attn(packed, pages, pages, starts, None, 5, 8, seqused_k=used, block_table=table)
    assert (watched.results, dict(watched.skipped)) == (2, {})


def test_autocast_is_verified_in_the_dtype_that_the_kernel_got() -> None:
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16), attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attnplug.scaled_dot_product_attention(query, key, value)
    assert (out.dtype, watched.results) == (torch.bfloat16, 1)


def test_pytorchs_own_function_is_verified_while_it_is_routed_here() -> None:
    query, key, value = tensors()
    with attnplug.patch_torch(), attnplug.verify(1.0) as watched:
        F.scaled_dot_product_attention(query, key, value)
    assert watched.results == 1


def test_calls_of_pytorchs_own_function_that_are_not_routed_are_not_said_to_be_right() -> None:
    query = torch.randn(1, 2, 4, 8)
    with attnplug.verify(rate=1.0) as watched:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert "no call was seen" in str(watched) and "patch_torch()" in str(watched)
    with attnplug.verify(rate=0.0) as watched:
        attnplug.scaled_dot_product_attention(query, query, query, impl="aten_math")
    assert "no call was seen" not in str(watched)  # with this rate nobody counts


def test_a_wrong_result_is_a_warning_with_the_error_and_its_place() -> None:
    impl = register(WrongOut)
    query, key, value = tensors(9)
    with attnplug.verify(1.0) as watched, pytest.warns(MismatchWarning, match="out: largest error") as caught:
        out = attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
    (mismatch,) = watched.mismatches
    right = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    error = (out - right).abs()
    assert (mismatch.impl, mismatch.name, mismatch.reference) == (impl, "out", "math_ref")
    assert mismatch.error == pytest.approx(error.max().item())
    assert error[mismatch.place] == error.max()
    assert mismatch.allowed is not None and mismatch.allowed < mismatch.error / 10
    assert caught[0].filename == __file__
    assert str(mismatch) in str(watched)


def test_the_caller_gets_what_was_chosen_also_if_it_is_wrong() -> None:
    impl = register(WrongOut)
    query, key, value = tensors(9)
    plain = attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
    with attnplug.verify(1.0, on_mismatch=lambda mismatch: None):
        assert torch.equal(attnplug.scaled_dot_product_attention(query, key, value, impl=impl), plain)


def test_a_wrong_lse_is_found_where_it_is_asked_for() -> None:
    impl = register(WrongLse)
    query, key, value = tensors()
    with attnplug.verify(1.0, on_mismatch=lambda mismatch: None) as watched:
        attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
        assert watched.wrong == 0
        attnplug.scaled_dot_product_attention(query, key, value, return_lse=True, impl=impl)
    assert [mismatch.name for mismatch in watched.mismatches] == ["lse"]


def test_raise_raises_from_the_call_an_error_that_can_be_pickled() -> None:
    impl = register(WrongOut)
    query, key, value = tensors(9)
    with attnplug.verify(1.0, on_mismatch="raise"), pytest.raises(MismatchError, match="out: largest error") as caught:
        attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.mismatches == caught.value.mismatches
    assert str(again) == str(caught.value)


def test_a_copy_of_what_goes_on_has_what_was_found_and_does_not_go_on() -> None:
    query, key, value = tensors()
    with attnplug.verify(1.0) as watched:
        attnplug.scaled_dot_product_attention(query, key, value)
        again = pickle.loads(pickle.dumps(watched))
        attnplug.scaled_dot_product_attention(query, key, value)
    assert again.results == 1 and watched.results == 2
    with again:
        attnplug.scaled_dot_product_attention(query, key, value)
    assert again.results == 2


def test_a_function_gets_the_tensors_and_the_record_keeps_none() -> None:
    impl = register(WrongOut)
    query, key, value = tensors(9)
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append) as watched:
        attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
    assert torch.equal(found[0].arguments["query"], query)
    assert watched.mismatches[0].arguments == {}


def register_wrong_reference() -> str:
    """Register a kernel that takes every call, and is wrong for each."""
    from attnplug_math_ref import impl

    def forward(params: attnplug.SDPAParams) -> tuple[torch.Tensor, ...]:
        out, *others = impl.forward(params)
        return (out * 1.1, *others)

    features = set(attnplug.Feature) - {attnplug.Feature.NESTED}
    capabilities = attnplug.Capabilities(features=features)
    spec = attnplug.ImplSpec(
        name="enlarged", kernel=forward, backend=attnplug.SDPBackend.MATH, capabilities=capabilities
    )
    attnplug.register_impl(spec)
    return spec.name


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {
            "is_causal": True,
            "causal_variant": attnplug.CausalVariant.LOWER_RIGHT,
            "window_size": (4, 0),
            "softcap": 5.0,
        },
        {"attn_mask": torch.arange(9) < 5},
        {"seqused_k": torch.tensor([5], dtype=torch.int32)},
    ],
    ids=str,
)
def test_the_arguments_that_a_function_gets_repeat_the_call(asked: dict[str, Any]) -> None:
    impl = register_wrong_reference()
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        out = attnplug.scaled_dot_product_attention(*tensors(9), **asked, impl=impl)
    again = attnplug.scaled_dot_product_attention(**found[0].arguments, impl=impl)
    assert torch.equal(again, out)


def test_the_arguments_of_packed_sequences_repeat_the_call() -> None:
    impl = register_wrong_reference()
    packed, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        out = attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, is_causal=True, impl=impl)
    again = attnplug.varlen_attn(**found[0].arguments, impl=impl)
    assert torch.equal(again, out)


def test_a_mismatch_names_the_layer_of_its_result_and_of_its_gradients() -> None:
    impl = register(WrongOut)

    class Layer(torch.nn.Module):
        def __init__(self, impl: str) -> None:
            super().__init__()
            self.impl = impl

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attnplug.scaled_dot_product_attention(x, x, x, impl=self.impl)

    model = torch.nn.Sequential(Layer("math_ref"), Layer(impl), Layer("math_ref"))
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch=lambda mismatch: None) as watched:
        model(x).sum().backward()
    assert {mismatch.name for mismatch in watched.mismatches} == {"out", "query", "key"}
    assert {mismatch.module for mismatch in watched.mismatches} == {"Sequential.1"}
    assert f"{impl} in Sequential.1, held against" in str(watched)


def test_a_wrong_kernel_warns_once_and_is_counted_each_time() -> None:
    impl = register(WrongOut)
    query, key, value = tensors(9)

    def call_often() -> None:
        for _ in range(120):
            attnplug.scaled_dot_product_attention(query, key, value, impl=impl)

    with attnplug.verify(1.0) as watched, pytest.warns(MismatchWarning) as caught:
        call_often()
    assert (len(caught), watched.wrong, len(watched.mismatches)) == (1, 120, 100)


SKIPPED: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda x: attnplug.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "nested": lambda x: attnplug.scaled_dot_product_attention(*[torch.nested.nested_tensor([x[0]])] * 3),
    "transform of torch.func": lambda x: torch.func.vmap(attnplug.scaled_dot_product_attention)(*[x[None]] * 3),
    "dispatch mode": lambda x: _counted(x),
}


def _counted(x: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return attnplug.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_cannot_be_verified_runs_and_says_why(reason: str) -> None:
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        SKIPPED[reason](torch.randn(1, 2, 5, 8))
    assert watched.results == 0
    assert [why for why in watched.skipped if reason in why], watched.skipped
    assert reason in str(watched)


def test_a_reference_that_takes_no_such_call_is_a_reason() -> None:
    query, key, value = tensors()
    with attnplug.verify(1.0, reference="aten_math") as watched:
        attnplug.scaled_dot_product_attention(query, key, value, softcap=2.0)
    assert list(watched.skipped) == [
        "aten_math does not take such a call in float64: does not support softcap",
    ]


def test_a_reference_that_fails_stops_no_program() -> None:
    class Failing(Formula):
        @classmethod
        def forward(cls, params: attnplug.SDPAParams) -> tuple[Any, ...]:
            raise MemoryError("out of memory")

    query, key, value = tensors()
    with (
        attnplug.verify(1.0, reference=register(Failing), on_mismatch="raise") as watched,
        pytest.warns(RuntimeWarning, match="verify could not compare a call: MemoryError: out of memory"),
    ):
        attnplug.scaled_dot_product_attention(query, key, value)
    assert list(watched.skipped) == ["the comparison raised MemoryError"]


def test_an_implementation_that_runs_only_where_it_is_named_is_compared_too() -> None:
    attnplug.register_impl(attnplug.ImplSpec(name="shy", kernel=WrongOut, backend=None, named_only=True))
    with attnplug.verify(1.0, on_mismatch="raise"), pytest.raises(MismatchError, match="shy, held against math_ref"):
        attnplug.scaled_dot_product_attention(*tensors(9), impl="shy")


def test_what_a_reference_calls_itself_nobody_is_told_of() -> None:
    def forward(params: attnplug.SDPAParams) -> tuple[Tensor, None]:
        out = attnplug.scaled_dot_product_attention(params.query, params.key, params.value, scale=params.scale)
        return out, None

    attnplug.register_impl(attnplug.ImplSpec(name="calling", kernel=forward, backend=None))
    with attnplug.record() as calls, attnplug.verify(1.0, reference="calling") as watched:
        attnplug.scaled_dot_product_attention(*tensors())
    assert (len(calls), watched.calls, watched.results) == (1, 1, 1)


def test_numbers_of_which_the_rule_says_nothing_are_a_reason() -> None:
    query = torch.full((1, 1, 2, 8), 300.0, dtype=torch.float16)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.scaled_dot_product_attention(query, query, query)
    assert watched.results == 0
    assert "overflows" in str(watched)


def test_the_share_of_calls_that_is_verified_is_the_rate() -> None:
    query, key, value = tensors(2)
    with attnplug.verify(0.2, seed=3) as watched:
        for _ in range(500):
            attnplug.scaled_dot_product_attention(query, key, value)
    assert watched.calls == 500
    assert 70 <= watched.results <= 130


def test_equal_seeds_verify_equal_calls_and_others_do_not() -> None:
    impl = register(WrongOut)

    def sampled(seed: int) -> list[str]:
        found: list[Mismatch] = []
        with attnplug.verify(0.3, on_mismatch=found.append, seed=seed):
            for length in range(1, 320, 8):
                attnplug.scaled_dot_product_attention(*tensors(length), impl=impl)
        return [re.findall(r"queries=(\d+)", mismatch.call)[0] for mismatch in found]

    assert sampled(0) == sampled(0) != sampled(1)


def test_rate_0_puts_nothing_in_place() -> None:
    before = process_state.snapshot()
    with attnplug.verify(0) as watched:
        assert process_state.differences(before, process_state.snapshot()) == []
        attnplug.scaled_dot_product_attention(*tensors())
    assert watched.calls == 0
    watched.rate = 1.0
    with watched:
        attnplug.scaled_dot_product_attention(*tensors())
    assert watched.results == 1


def in_another_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_block_is_for_its_thread_and_start_for_the_process() -> None:
    def call() -> None:
        attnplug.scaled_dot_product_attention(*tensors())

    with attnplug.verify(1.0) as of_thread:
        in_another_thread(call)
    of_process = attnplug.verify(1.0).start()
    try:
        in_another_thread(call)
        call()
    finally:
        of_process.stop()
    call()
    assert (of_thread.calls, of_process.results) == (0, 2)


def test_threads_that_verify_together_lose_nothing() -> None:
    impl = register(WrongOut)
    wrong, right = tensors(9), tensors(8)

    def work() -> None:
        for _ in range(20):
            attnplug.scaled_dot_product_attention(*wrong, impl=impl)
            attnplug.scaled_dot_product_attention(*right, impl=impl)

    watched = attnplug.verify(1.0, on_mismatch=lambda mismatch: None).start()
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        watched.stop()
    assert (watched.calls, watched.results, watched.wrong) == (160, 160, 80)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rate": 1.5}, "rate: expected a number from 0 to 1"),
        ({"rate": True}, "rate: expected a number from 0 to 1"),
        ({"rate": float("nan")}, "rate: expected a number from 0 to 1"),
        ({"rate": 0.1, "on_mismatch": "ignore"}, "on_mismatch: expected 'warn', 'raise' or a function"),
        ({"rate": 0.1, "reference": "flash_triton"}, "reference: 'flash_triton' does not compute in float64 (only bfl"),
        ({"rate": 0.1, "reference": "math_reff"}, "reference: unknown implementation 'math_reff'; did you mean"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        attnplug.verify(**arguments)


def test_a_rate_may_be_a_number_of_numpy() -> None:
    assert attnplug.verify(np.float32(0.5)).rate == 0.5 and attnplug.verify(1).rate == 1.0


def test_it_is_started_once_and_stopped_once() -> None:
    watched = attnplug.verify(0.5)
    with pytest.raises(attnplug.ScopeError, match="not started"):
        watched.stop()
    with watched, pytest.raises(attnplug.ScopeError, match="started already"):
        watched.start()


def test_a_block_without_a_name_compares_gradients_after_its_end() -> None:
    """Whose graph is all that holds it then."""
    impl, (query, key, value) = register(WrongGradient), tensors(5, 17)
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        out = attnplug.scaled_dot_product_attention(query, key.requires_grad_(), value, impl=impl)
    gc.collect()
    assert found == []
    out.sum().backward()
    assert [mismatch.name for mismatch in found] == ["key"]


def test_a_quantized_kernel_is_held_to_its_own_rule() -> None:
    class Rounded(Formula):
        @classmethod
        def forward(cls, params: attnplug.SDPAParams) -> tuple[Any, ...]:
            out, lse = super().forward(params)
            return out * 1.02, lse

    attnplug.register_impl(
        attnplug.ImplSpec(
            name="rounded", kernel=Rounded, backend=None, capabilities=attnplug.Capabilities(quantized=True)
        )
    )
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.scaled_dot_product_attention(*tensors(), impl="rounded")
    assert watched.results == 1


def test_a_verification_may_end_while_it_compares() -> None:
    running: list[attnplug.verify] = []

    class Ending(Formula):
        @classmethod
        def forward(cls, params: attnplug.SDPAParams) -> tuple[Any, ...]:
            running.pop().stop()
            return super().forward(params)

    watched = attnplug.verify(1.0, reference=register(Ending)).start()
    running.append(watched)
    query, key, value = tensors()
    for _ in range(2):
        attnplug.scaled_dot_product_attention(query, key, value)
    assert (watched.calls, watched.results) == (1, 1)


def test_each_module_has_its_own_warning() -> None:
    impl = register(WrongOut)

    class First(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return attnplug.scaled_dot_product_attention(*given)

    class Second(First):
        pass

    with attnplug.verify(1.0):
        for module in (First(), Second()):
            handle = attnplug.bind(module, impl)
            with pytest.warns(MismatchWarning, match=f"in {type(module).__name__},") as caught:
                _ = [module(*tensors(9)) for _ in range(2)]
            assert len(caught) == 1
            handle.remove()
