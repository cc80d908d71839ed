"""What a kernel prepared for packed sequences runs for those that repeat them in all but numbers, and for no others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnplug
import repeated
from attnplug import CausalVariant, ImplSpec, KernelError, SDPAParams
from repeated import EVERYTHING, PAGES, STARTS, TOKENS, Answer, Packs, answer, gradients, row

reference = partial(attnplug.varlen_attn, impl="math_ref")


@contextmanager
def registered(kernel: Packs, backend: Any = None) -> Iterator[Callable[..., Any]]:
    attnplug.register_impl(ImplSpec(name="packs", kernel=kernel, backend=backend, capabilities=EVERYTHING))
    try:
        yield partial(attnplug.varlen_attn, impl="packs")
    finally:
        attnplug.unregister_impl("packs")


def sequences(tokens: Tensor = TOKENS, starts: Tensor = STARTS, longest: int = 5) -> tuple[Any, ...]:
    return tokens, tokens, tokens, starts, starts, longest, longest


def pages(longest: int = 5, blocks: int = 3, used: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call of two sequences of one query each, over pages that lie anywhere."""
    table = torch.randperm(6)[: 2 * blocks].int().view(2, blocks)
    used = row(longest, longest // 2) if used is None else used
    return (torch.randn(2, 4, 8), PAGES, PAGES, row(0, 1, 2), None, 1, longest), dict(seqused_k=used, block_table=table)


def assert_right(attend: Any, *given: Any, **options: Any) -> None:
    torch.testing.assert_close(attend(*given, **options), reference(*given, **options), equal_nan=True)


def test_sequences_that_repeat_others_in_all_but_numbers_run_what_the_kernel_prepared() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            for starts in (STARTS, row(0, 5, 9), row(0, 5, 7)):
                assert_right(attend, *sequences(torch.randn(9, 4, 8), starts))
                assert_right(attend, *sequences(torch.randn(9, 4, 8), starts), is_causal=True, return_lse=True)
                assert_right(attend, *sequences()[:3], starts, row(0, 3, 8), 5, 5, window_size=(2, 0), scale=0.3)
                assert_right(attend, *sequences()[:3], starts, row(0, 3, 8), 5, 5, seqused_k=row(1, 2), softcap=3.0)
        assert kernel.forwards == 2 * 4 == kernel.asked * 2  # the first is decided, the second is asked about
        assert kernel.runs == 9 * 4 - kernel.forwards


def test_a_decode_loop_over_pages_runs_what_the_kernel_prepared() -> None:
    """The longest sequence grows by one with each token, and the table now and then."""
    layers = 4
    with registered(kernel := Packs()) as attend:
        for longest in (*range(1, 7), *range(1, 7)):
            for blocks in (-(-longest // 2), 3):
                for _ in range(layers):
                    given, options = pages(longest, blocks)
                    assert_right(attend, *given, **options, is_causal=True)
        assert kernel.forwards + kernel.runs == 2 * 12 * layers
        assert kernel.asked <= 12 and kernel.forwards <= 14


def test_a_kernel_prepares_for_no_longest_sequence_that_never_comes_again() -> None:
    with registered(kernel := Packs()) as attend:
        for longest in range(5, 60):
            assert_right(attend, *sequences(longest=longest))
    assert (kernel.asked, kernel.runs) == (1, 0)


def leaves(count: int = 3) -> list[Tensor]:
    return [torch.randn(9, 4, 8).requires_grad_() for _ in range(count)]


def assert_trains(
    attend: Any, given: list[Tensor], *lengths: Any, among: list[Tensor] | None = None, **options: Any
) -> None:
    """Assert that gradients of those that need one are right, `among` these and others."""
    wanted = [tensor for tensor in (given if among is None else among) if tensor.requires_grad]
    both = [function(*given, *(lengths or sequences()[3:]), **options) for function in (attend, reference)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), wanted) for out in both])


def test_calls_that_autograd_records_run_what_the_kernel_prepared_for_both_ways() -> None:
    with registered(kernel := Packs()) as attend:
        for starts in (STARTS, row(0, 5, 9), row(0, 5, 7), STARTS):
            assert_trains(attend, leaves(), starts, starts, 5, 5)
            assert_trains(attend, leaves(), starts, row(0, 3, 8), 5, 5, is_causal=True, seqused_k=row(1, 2))
    assert (kernel.forwards, kernel.runs, kernel.asked) == (4, 4, 2)
    assert (kernel.backwards, kernel.runs_of_backward, kernel.asked_for_backward) == (4, 4, 2)


def test_each_step_of_a_training_has_sizes_of_its_own_and_layers_that_repeat_them() -> None:
    steps, layers = 30, 3
    with registered(kernel := Packs()) as attend:
        for step in range(steps):
            tokens = 20 + step * 7 % 30
            starts = row(0, tokens // 3, tokens)
            for _ in range(layers):
                given = [torch.randn(tokens, 4, 8).requires_grad_() for _ in range(3)]
                assert_trains(attend, given, starts, starts, tokens, tokens)
    assert kernel.forwards <= 1 + 2 * 8 and kernel.backwards == kernel.forwards
    assert kernel.forwards + kernel.runs == kernel.backwards + kernel.runs_of_backward == steps * layers


def test_sinks_and_slopes_are_given_to_what_was_prepared() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(5):
            sinks, slopes = torch.randn(2, 4)
            assert_right(attend, *sequences(), sinks=sinks)
            assert_right(attend, *sequences(), alibi_slopes=slopes)
            assert_right(attend, *sequences(), sinks=sinks, alibi_slopes=slopes, seqused_k=row(1, 2))
            given, sinks = leaves(), sinks.requires_grad_()
            assert_trains(attend, given, among=[*given, sinks], sinks=sinks, alibi_slopes=slopes)
            assert_trains(attend, given, sinks=sinks.detach())
            assert_trains(attend, [tensor.detach() for tensor in given], among=[sinks], sinks=sinks)
    kinds = 6
    assert kernel.runs == 3 * kinds and kernel.asked == kinds
    assert kernel.runs_of_backward == 3 * 3 and kernel.asked_for_backward == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_sinks_and_slopes_may_begin_before_what_it_repeats_was_prepared(reentrant: bool) -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            given, sinks = leaves(), torch.randn(4).requires_grad_()
            call = partial(attend, alibi_slopes=torch.ones(4), sinks=sinks)
            out = checkpoint(call, *given, *sequences()[3:], use_reentrant=reentrant)
            expected = reference(*given, *sequences()[3:], alibi_slopes=torch.ones(4), sinks=sinks)
            wanted = [*given, sinks]
            out.sum().backward()
            torch.testing.assert_close([each.grad for each in wanted], [*torch.autograd.grad(expected.sum(), wanted)])
    assert kernel.runs > 0 < kernel.runs_of_backward


def test_a_gradient_of_sinks_that_is_missing_later_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(Packs()) as attend:
        for _ in range(3):
            given, sinks = leaves(), torch.randn(4).requires_grad_()
            assert_trains(attend, given, among=[*given, sinks], sinks=sinks)
        monkeypatch.setattr(repeated, "gradients", lambda params, grad_out: gradients(params, grad_out)[:3])
        with pytest.raises(KernelError, match="'packs': backward returned no gradient of sinks"):
            attend(*given, *sequences()[3:], sinks=sinks).square().sum().backward()


def test_sinks_and_slopes_of_other_sizes_are_mistakes_as_ever() -> None:
    with registered(kernel := Packs()) as attend:
        for options in ({"sinks": torch.ones(4)}, {"alibi_slopes": torch.ones(4)}):
            for _ in range(3):
                assert_right(attend, *sequences(), **options)
            (name,) = options
            for wrong in (torch.ones(3), torch.ones(1), torch.ones(1, 1, 4), torch.ones(4, dtype=torch.int32), 1.0):
                with pytest.raises((TypeError, ValueError), match=name):
                    attend(*sequences(), **{name: wrong})
        with pytest.raises(ValueError, match="alibi_slopes"):
            attend(*sequences(), alibi_slopes=torch.ones(4, requires_grad=True))
        for slopes in (torch.randn(2, 4), torch.randn(2, 4)):
            assert_right(attend, *sequences(), alibi_slopes=slopes)
        with pytest.raises(ValueError, match="alibi_slopes"):
            attend(*sequences(), alibi_slopes=torch.ones(3, 4))
        with pytest.raises(ValueError, match="alibi_slopes"):
            attend(*sequences(starts=row(0, 3, 5, 9)), alibi_slopes=torch.ones(2, 4))
        assert kernel.runs == 2


def test_what_changes_before_backward_is_an_error_of_prepared_calls_too() -> None:
    with registered(kernel := Packs()) as attend:
        for changed in (None, 0, 1, 2):
            for _ in range(3):
                query, source, starts = leaves(1)[0], torch.randn(9, 4, 8), STARTS.clone()
                out = attend(query, source, source.clone(), starts, STARTS, 5, 5)
            if changed is None:
                torch.autograd.grad(out.sum(), query)
                continue
            (source, starts, out)[changed].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.sum(), query)
        assert kernel.runs > 0


def test_a_graph_that_is_retained_runs_what_was_prepared_again() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            given = leaves()
            loss = attend(*given, *sequences()[3:]).sum()
            once, again = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
            torch.testing.assert_close(once, again)
    assert kernel.runs_of_backward == 2


def test_one_tensor_may_be_all_of_a_recorded_call() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(4):
            (tokens,) = leaves(1)
            assert_trains(attend, [tokens] * 3)
            assert_trains(attend, [*leaves(1), tokens, tokens])
            assert_trains(attend, leaves(), STARTS, STARTS.clone(), 5, 5)
    assert kernel.runs == kernel.runs_of_backward >= 2 * 3


def test_tensors_of_which_some_need_no_gradient_get_none() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(4):
            for needed in ((0,), (1, 2), (0, 1, 2)):
                given = leaves()
                for number in {0, 1, 2}.difference(needed):
                    given[number].requires_grad_(False)
                assert_trains(attend, given)
    assert kernel.asked_for_backward == 3 and kernel.runs_of_backward >= 2 * 3


MISTAKES: dict[str, tuple[Any, ...]] = {
    "a sequence beyond the tokens": sequences(starts=row(0, 5, 10)),
    "a sequence that ends before it starts": sequences(starts=row(0, 5, 4)),
    "a sequence longer than the longest": sequences(starts=row(0, 3, 9)),
    "a longest that is smaller": sequences(longest=4),
    "a longest below zero": sequences(longest=-5),
    "a bool for the longest": sequences(longest=True),
    "a number for the longest": sequences(longest=5.0),  # type: ignore[arg-type]
    "starts of another dtype": sequences(starts=STARTS.long()),
    "starts of two dimensions": sequences(starts=STARTS[None]),
    "starts on another device": sequences(starts=STARTS.to("meta")),
    "no starts": sequences(starts=None),  # type: ignore[arg-type]
    "values of fewer tokens": (TOKENS, TOKENS, TOKENS[:8], *sequences()[3:]),
    "a key of another dtype": (TOKENS, TOKENS.double(), TOKENS, *sequences()[3:]),
    "a key on another device": (TOKENS, TOKENS.to("meta"), TOKENS, *sequences()[3:]),
    "a sparse key": (TOKENS, TOKENS.to_sparse(), TOKENS, *sequences()[3:]),
    "sparse starts": sequences(starts=STARTS.to_sparse()),
    "starts of keys of another length": (*sequences()[:4], row(0, 9), 5, 9),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen_after_calls_that_were_prepared(mistake: str, device: str) -> None:
    """On a device whose numbers nobody looks at, those that are no matter of numbers."""

    def on(given: tuple[Any, ...]) -> tuple[Any, ...]:
        moved = {id(each): there(each) for each in given if isinstance(each, Tensor)}  # what is one tensor stays one
        return tuple(moved.get(id(each), each) for each in given)

    def there(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # on the other of the two devices
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if device == "meta" else tensor
        return tensor.to(device)

    def raised(attend: Any) -> Any:
        try:
            attend(*on(MISTAKES[mistake]))
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return None

    with registered(kernel := Packs()) as attend:
        expected = raised(attend)
        for _ in range(4):
            attend(*on(sequences()))
            before = kernel.forwards + kernel.runs
            assert raised(attend) == expected
            assert expected is None or kernel.forwards + kernel.runs == before
        assert kernel.runs > 0
    only_in_numbers = mistake.startswith("a sequence") or mistake == "a longest that is smaller"
    assert (expected is None) is (device == "meta" and only_in_numbers)


def test_pages_and_used_lengths_are_looked_at_each_time() -> None:
    given, options = pages()
    with registered(kernel := Packs()) as attend:
        for _ in range(4):
            assert_right(attend, *given, **options)
        for wrong, message in (
            (options | {"seqused_k": row(6, 1)}, "seqused_k: expected values from 0 to 5"),
            (options | {"seqused_k": row(5, -1)}, "seqused_k: expected values from 0 to 5"),
            (options | {"block_table": options["block_table"] + 6}, "block_table: expected values from 0 to 5"),
            (options | {"block_table": options["block_table"][:1]}, "block_table: expected shape"),
            (options | {"block_table": options["block_table"].long()}, "block_table: expected dtype"),
            (options | {"seqused_k": row(1, 2, 3)}, "seqused_k: expected shape"),
        ):
            with pytest.raises(ValueError, match=message):
                attend(*given, **wrong)
        assert (kernel.forwards, kernel.runs) == (2, 2)
        assert_right(attend, *given, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_mistakes_in_pages_and_used_lengths_are_seen_after_calls_that_were_prepared(device: str) -> None:
    """On a device whose numbers nobody looks at, too: all else about them is compared."""
    (query, *others), named = pages()
    elsewhere = {"cpu": "meta", "meta": "cpu"}[device]

    def raised(attend: Any, **changed: Any) -> Any:
        there = [each.to(device) if isinstance(each, Tensor) else each for each in (query, *others)]
        options = {name: tensor.to(device) for name, tensor in named.items()} | changed
        try:
            attend(*there, **options)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return None

    def on(tensor: Tensor, device: str = device) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    with registered(kernel := Packs()) as attend:
        for name, tensor in named.items():
            for wrong in (
                *(on(tensor).long(), on(tensor)[None], on(tensor)[:1], on(tensor)[0], on(torch.cat([tensor, tensor]))),
                *(on(tensor, elsewhere), None, [1, 2]),
            ):
                expected = raised(attend, **{name: wrong})
                assert expected is not None
                for _ in range(4):
                    assert raised(attend) is None
                    assert raised(attend, **{name: wrong}) == expected
        assert kernel.runs > 0


def test_what_is_around_or_asked_besides_is_no_call_that_was_prepared() -> None:
    some = torch.ones(2)
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            assert_right(attend, *sequences())
        runs = kernel.runs
        call = partial(attend, *sequences())
        for around in (FlopCounterMode(display=False), profile(), torch.autograd.forward_ad.dual_level()):
            with around:
                torch.testing.assert_close(call(), reference(*sequences()))
        torch.testing.assert_close(torch.vmap(lambda x: call().sum() + x)(some), reference(*sequences()).sum() + some)
        torch.func.grad(lambda x: call().sum() + x.sum())(some)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert attend(*map(mode.from_tensor, sequences()[:5]), 5, 5).shape == TOKENS.shape
        assert_right(attend, *sequences(), sinks=torch.ones(4))
        assert_right(attend, *sequences(), alibi_slopes=torch.ones(4))
        assert kernel.runs == runs
        with attnplug.record() as calls:
            assert_right(attend, *sequences())
        assert "packs" in [made.impl for made in calls]
        assert_right(attend, *sequences())
        assert kernel.runs == runs + 2


def test_what_is_around_a_recorded_call_is_no_call_that_was_prepared() -> None:
    given, lengths = leaves(), sequences()[3:]

    def loss(attend: Any, *tensors: Tensor) -> Tensor:
        loss: Tensor = attend(*tensors, *lengths).square().sum()
        return loss

    expected = torch.autograd.grad(loss(reference, *given), given)
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            assert_trains(attend, leaves())
        runs = kernel.runs, kernel.runs_of_backward
        for around in (FlopCounterMode(display=False), torch.autograd.forward_ad.dual_level()):
            with around:
                assert_trains(attend, leaves())
        torch.testing.assert_close(torch.func.grad(partial(loss, attend), (0, 1, 2))(*given), expected)
        graph = make_fx(lambda *tensors: torch.autograd.grad(loss(attend, *tensors), tensors))(*given)
        torch.testing.assert_close(graph(*given), expected)
        assert (kernel.runs, kernel.runs_of_backward) == runs
        prepared = loss(attend, *given)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(torch.autograd.grad(prepared, given), expected)
        assert (kernel.runs, kernel.runs_of_backward) == (runs[0] + 1, runs[1])
        with attnplug.record() as calls, attnplug.verify(1.0, on_mismatch="raise"):
            assert_trains(attend, leaves())
        assert [made.impl for made in calls].count("packs") == 1
        assert (kernel.runs, kernel.runs_of_backward) == (runs[0] + 2, runs[1] + 1)


def test_tensors_that_are_not_what_lies_in_memory_are_resolved_before_a_kernel_reads() -> None:
    """PyTorch puts off a minus; what was prepared reads memory."""
    with registered(kernel := Packs()) as attend:
        for given in (sequences(torch._neg_view(-TOKENS)), sequences(starts=torch._neg_view(-STARTS))):
            for _ in range(4):
                assert_right(attend, *given)
        assert kernel.runs == 0


def test_every_call_that_is_watched_is_seen() -> None:
    with registered(Packs()) as attend, attnplug.record() as calls:
        for longest in (5, 5, 6, 6, 6, 5):
            attend(*sequences(longest=longest))
    assert [made.impl for made in calls].count("packs") == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_profiler_sees_the_range_of_calls_that_were_prepared(device: str) -> None:
    """On a device whose numbers nobody looks at, too."""
    tokens, starts = TOKENS.to(device), STARTS.to(device)
    with registered(kernel := Packs()) as attend:
        for _ in range(3):
            attend(*sequences(tokens, starts))
        with profile() as profiled:
            attend(*sequences(tokens, starts))
    assert kernel.runs > 0 and sum("packs" in event.name for event in profiled.events()) == 1


def test_repeated_sequences_that_an_unfused_kernel_prepared_for_warn_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnplug, "WARN_FOR_UNFUSED_KERNELS", True)
    with registered(Packs(), attnplug.SDPBackend.MATH), attnplug.sdpa_kernel(["FA3", "packs"]):
        for _ in range(4):
            with pytest.warns(UserWarning, match="FA3: runs on cuda"):
                attnplug.varlen_attn(*sequences())


def test_a_kernel_that_looks_at_lengths_is_asked_about_those_of_every_call() -> None:
    class Short(Packs):
        shape_dependent = True

        def supports(self, params: SDPAParams) -> str:
            return "is for short sequences" if params.max_q > 5 else ""

    with registered(Short()) as attend:
        for _ in range(4):
            assert_right(attend, *sequences())
            with pytest.raises(attnplug.NoImplementationError, match="is for short sequences"):
                attend(*sequences(longest=6))


def test_sequences_under_autocast_run_without_it() -> None:
    def checked(params: SDPAParams) -> Any:
        assert not torch.is_autocast_enabled("cpu") and params.query.dtype is torch.bfloat16
        return answer(params)

    with registered(kernel := Packs(checked)) as attend:
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32) * 2:
            given = sequences(torch.randn(9, 4, 8).to(dtype))
            with torch.autocast("cpu", torch.bfloat16):
                assert_right(attend, *given)
                assert torch.is_autocast_enabled("cpu")
            assert_right(attend, *sequences(given[0].bfloat16()))
        assert kernel.runs > 4
        with torch.autocast("cpu", torch.float16):
            assert reference(*sequences()).dtype is torch.float16
            kernel.answer = answer
            assert_right(attend, *sequences(TOKENS.bfloat16()))


def test_starts_of_queries_and_keys_may_be_one_tensor_or_two() -> None:
    with registered(kernel := Packs()) as attend:
        for _ in range(4):
            assert_right(attend, *sequences())
            assert_right(attend, *sequences()[:4], STARTS.clone(), 5, 5)
            assert_right(attend, TOKENS, TOKENS[:8].clone(), TOKENS[:8].clone(), STARTS, row(0, 4, 8), 5, 5)
        assert kernel.forwards == 4


def every_second(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


def in_columns(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def test_layouts_of_their_own_are_prepared_for_on_their_own() -> None:
    usual, (paged, named) = sequences(), pages()
    keys, used, table = row(0, 3, 9), named["seqused_k"], named["block_table"]
    calls = [
        (usual, {}),
        (sequences(heads_first(TOKENS)), {}),
        (sequences(torch.randn(9, 4, 16)[..., :8]), {}),
        (sequences(starts=every_second(STARTS)), {}),
        *(((*usual[:4], starts, 5, 6), {}) for starts in (keys, every_second(keys))),
        *((usual, {"seqused_k": lengths}) for lengths in (row(1, 2), every_second(row(1, 2)))),
        *((paged, named | {"seqused_k": lengths}) for lengths in (used, every_second(used))),
        *((paged, named | {"block_table": each}) for each in (in_columns(table), every_second(table))),
        ((paged[0], *(heads_first(each) for each in paged[1:3]), *paged[3:]), named),
    ]
    with registered(kernel := Packs()) as attend:
        for _ in range(4):
            for given, options in calls:
                assert_right(attend, *given, **options)
        assert kernel.asked == len(calls) and kernel.runs >= 2 * len(calls)


def test_what_is_prepared_for_sequences_may_have_forward_called_after_all() -> None:
    with registered(kernel := Packs(lambda params: None)) as attend:
        for _ in range(4):
            assert_right(attend, *sequences(torch.randn(9, 4, 8)))
            given, options = pages()
            assert_right(attend, *given, **options, return_lse=True)
    assert (kernel.forwards, kernel.runs) == (8, 4)


@pytest.mark.parametrize("wrong", [lambda params: params.query, lambda params: (params.query[:1], None)])
def test_what_is_prepared_for_sequences_is_checked(wrong: Answer) -> None:
    with registered(Packs(wrong)) as attend:
        for _ in range(2):
            attend(*sequences())
        with pytest.raises(attnplug.KernelError, match="'packs'"):
            attend(*sequences())


def test_what_is_prepared_for_sequences_must_be_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packs, "prepare_packed", lambda kernel, params: params.scale)
    with registered(Packs()) as attend:
        attend(*sequences())
        with pytest.raises(attnplug.KernelError, match="'packs': prepare_packed must return a function or None"):
            attend(*sequences())


def test_a_kernel_is_told_of_sequences_aligned_to_the_lower_right_with_a_scale() -> None:
    told = []

    class Told(Packs):
        def prepare_packed(self, params: SDPAParams) -> None:
            told.append((params.causal_variant, params.scale, params.max_q, params.max_k, params.needs_grad))

    with registered(Told()) as attend:
        for _ in range(3):
            attend(*sequences())
    assert told == [(CausalVariant.LOWER_RIGHT, pytest.approx(8**-0.5), 5, 5, False)]


def test_what_is_prepared_for_sequences_keeps_no_tensor_alive() -> None:
    with registered(Packs()) as attend:
        references = []
        for _ in range(4):
            given, options = pages()
            attend(*given, **options)
            tensors = [each for each in (given[0], given[3], *options.values()) if isinstance(each, Tensor)]
            references += [weakref.ref(tensor) for tensor in tensors]
            del given, options, tensors
        gc.collect()
        assert all(reference() is None for reference in references)
