"""Adapters with one wrong conversion each: the kit catches every one, so what it passes has none of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attnplug import Feature, SDPAParams
from attnplug.testing import check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import register, standin
from attnplug_adapters import convert, flash_attn4, sage_attention, specs, xformers
from attnplug_adapters.flash_attn2 import FlashAttn2
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.flashinfer import FlashInfer
from attnplug_adapters.sage_attention import SageAttention
from attnplug_adapters.xformers import XFormers

LIBRARIES: dict[type, tuple[str, Any, str]] = {
    FlashAttn2: ("flash_attn2", specs.FLASH_ATTN2, "float16"),
    FlashAttn3: ("flash_attn3", specs.FLASH_ATTN3, "bfloat16"),
    FlashAttn4: ("flash_attn4", specs.FLASH_ATTN4, "float16"),
    FlashInfer: ("flashinfer", specs.FLASHINFER, "float16"),
    XFormers: ("xformers", specs.XFORMERS, "float32"),
    SageAttention: ("sage2", specs.SAGE_ATTENTION, "float16"),
}


def same(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def tensor_of_the_call(params: Any, tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class Mistake:
    """One wrong conversion, and a check that must see it.

    Attributes:
        name: what is wrong.
        adapter: which one.
        check: the check of the kit that fails.
        place: a module or class, and the name in it that is replaced, by `wrong`.
        declares: a feature that is promised in vain.
    """

    name: str
    adapter: type
    check: str
    place: tuple[Any, str] | None = None
    wrong: Callable[..., Any] | None = None
    declares: Feature | None = None
    library: str = ""


def forgetting_the_sign(params: Any) -> Any:
    return RIGHT_SCALE(params)[0], 1


def mirrored(params: Any) -> Any:
    left, right = RIGHT_BAND(params)
    return right, left


def open_to_the_right(params: Any) -> Any:
    return params.window_size


def heads_modulo(tensor: Any, heads: int, dim: int = 2) -> Any:
    return tensor if heads == tensor.shape[dim] else torch.cat([tensor] * (heads // tensor.shape[dim]), dim)


def without(name: str) -> Callable[..., Any]:
    """A forward that drops an argument of the call."""

    def forward(self: Any, params: Any) -> Any:
        neutral = {"softcap": 0.0, "alibi_slopes": None, "sinks": None, "seqused_k": None, "scale": 1.0, "dropout": 0.0}
        neutral |= {"window_size": (-1, -1), "is_causal": False}
        return RIGHT_FORWARD[type(self)](self, replace(params, **{name: neutral[name]}))

    return forward


def with_the_scale_of_the_padded_size(self: Any, params: Any) -> Any:
    size = params.query.shape[-1]
    scale = params.scale * (size / convert.rounded_up(size, 8)) ** 0.5
    return RIGHT_FORWARD[type(self)](self, replace(params, scale=scale))


def without_lse_gradient(self: Any, params: Any, grad_out: Any, grad_lse: Any, *saved: Any) -> Any:
    return RIGHT_BACKWARD(self, params, grad_out, None, *saved)


def passing_the_mask(self: Any, params: Any) -> Any:
    return self.library.sageattn(params.query, params.key, params.value, attn_mask=params.attn_mask), None


def on_the_callers_keys(self: Any, params: Any) -> Any:
    params.key.sub_(params.key.mean(2, keepdim=True))
    return RIGHT_FORWARD[type(self)](self, params)


def shifted(left: int, right: int) -> Callable[..., Any]:
    """A band that is longer at its ends, wherever it has one."""

    def band(params: Any) -> Any:
        found = RIGHT_BAND(params)
        return tuple(side if side < 0 else side + more for side, more in zip(found, (left, right), strict=True))

    return band


def of_the_first_sequence(self: Any, params: Any) -> Any:
    slopes = params.alibi_slopes
    slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[0]
    return RIGHT_FORWARD[type(self)](self, replace(params, alibi_slopes=slopes))


def with_pages(order: Callable[[Any], Any]) -> Callable[..., Any]:
    """A forward that reads the block table in another order."""

    def forward(self: Any, params: Any) -> Any:
        table = params.block_table
        return RIGHT_FORWARD[type(self)](self, params if table is None else replace(params, block_table=order(table)))

    return forward


def with_lse_by_group(self: Any, params: Any) -> Any:
    """Its heads in the order (group, kv head), in which kernels that pack groups have them."""
    out, lse, *saved = RIGHT_FORWARD[type(self)](self, params)
    at = lse.dim() - 2
    return (
        out,
        lse.unflatten(at, (params.key.shape[-3 if at else -2], -1)).transpose(at, at + 1).flatten(at, at + 1),
        *saved,
    )


def in_the_order(*places: int) -> Callable[..., Any]:
    def forward(self: Any, params: Any) -> Any:
        found = *RIGHT_FORWARD[type(self)](self, params), torch.tensor([])
        return tuple(found[place] for place in places)

    return forward


def in_any_order() -> bool:
    return False


def without_the_sink_in_lse(params: Any, out: Any, lse: Any) -> Any:
    return RIGHT_SINKS(params, out, lse)[0], lse


def keys_as_they_lie(starts: Any, tokens: int) -> Any:
    return torch.zeros(tokens, dtype=torch.bool)


def with_windows_one_key_wider(self: Any, masks: Any, params: Any) -> Any:
    left, right = params.window_size
    return RIGHT_PACKED_BIAS(self, masks, replace(params, window_size=(left + 1 if left >= 0 else left, right)))


def with_upper_left_masks(self: Any, params: Any) -> Any:
    masks = self.library.fmha.attn_bias
    return masks.LowerTriangularMask() if params.is_causal else RIGHT_BIAS(self, params)


RIGHT_SCALE, RIGHT_BAND, RIGHT_SINKS = SDPAParams.with_positive_scale, convert.band, convert.with_sinks
RIGHT_FORWARD = {adapter: adapter.forward for adapter in LIBRARIES}
RIGHT_BACKWARD, RIGHT_BIAS, RIGHT_PACKED_BIAS = FlashAttn4.backward, XFormers._bias, xformers._Sequences.bias

MISTAKES = [
    Mistake("BHSD for BSHD", FlashAttn2, "check_batches_and_heads", (convert, "heads_behind"), same),
    Mistake(
        "a scale below 0 as it is", FlashAttn2, "check_scale", (SDPAParams, "with_positive_scale"), lambda p: (p, 1)
    ),
    Mistake(
        "the sign of the scale not in the gradient",
        FlashAttn2,
        "check_scale",
        (SDPAParams, "with_positive_scale"),
        forgetting_the_sign,
    ),
    Mistake(
        "an lse of plus infinity",
        FlashAttn2,
        "check_varlen_empty_sequences",
        (convert, "blind_as_minus_infinity"),
        same,
    ),
    Mistake(
        "minus infinity to the backward",
        FlashAttn2,
        "check_rows_before_the_first_key",
        (convert, "blind_as_infinity"),
        same,
    ),
    Mistake("head sizes not padded", FlashAttn2, "check_head_sizes", (convert, "padded"), same),
    Mistake("padding not taken away", FlashAttn2, "check_head_sizes", (convert, "first"), same),
    Mistake("memory as it lies", FlashAttn2, "check_misaligned_inputs", (convert, "aligned"), same),
    Mistake("window sides exchanged", FlashAttn2, "check_window", (convert, "band"), mirrored),
    Mistake("a causal window open to the right", XFormers, "check_causal_window", (convert, "band"), open_to_the_right),
    Mistake("softcap swallowed", FlashAttn2, "check_softcap", (FlashAttn2, "forward"), without("softcap")),
    Mistake("slopes swallowed", FlashAttn2, "check_alibi", (FlashAttn2, "forward"), without("alibi_slopes")),
    Mistake("scale swallowed", FlashAttn2, "check_scale", (FlashAttn2, "forward"), without("scale")),
    Mistake("window swallowed", FlashAttn2, "check_window", (FlashAttn2, "forward"), without("window_size")),
    Mistake("causal mask swallowed", FlashAttn2, "check_causal", (FlashAttn2, "forward"), without("is_causal")),
    Mistake("dropout swallowed", FlashAttn2, "check_dropout_probability", (FlashAttn2, "forward"), without("dropout")),
    Mistake(
        "the scale of the padded head size",
        FlashAttn2,
        "check_head_sizes",
        (FlashAttn2, "forward"),
        with_the_scale_of_the_padded_size,
    ),
    Mistake("lower right taken for upper left", FlashAttn2, "check_causal_upper_left", declares=Feature.UPPER_LEFT),
    Mistake("-1 for an open window", FlashAttn4, "check_window", (flash_attn4, "_open_as_none"), same),
    Mistake("sinks swallowed", FlashAttn4, "check_sinks", (FlashAttn4, "forward"), without("sinks")),
    Mistake(
        "the gradient of lse dropped", FlashAttn4, "check_lse_gradient", (FlashAttn4, "backward"), without_lse_gradient
    ),
    Mistake("base 2 taken for e", FlashInfer, "check_lse", (convert, "natural"), same),
    Mistake(
        "rows without keys left as they are",
        FlashInfer,
        "check_varlen_empty_sequences",
        (convert, "cleared"),
        lambda p, out, lse: (out, lse),
    ),
    Mistake("only used keys not told", FlashInfer, "check_seqused_k", (FlashInfer, "forward"), without("seqused_k")),
    Mistake(
        "upper left taken for lower right",
        XFormers,
        "check_causal_lower_right",
        (XFormers, "_bias"),
        with_upper_left_masks,
    ),
    Mistake("head h reads head h % Hkv", XFormers, "check_gqa", (convert, "spread_heads"), heads_modulo),
    Mistake("gradients of a group not summed", XFormers, "check_gqa_gradients", (convert, "sum_heads"), same),
    Mistake("the padding of lse not taken away", XFormers, "check_lse", (convert, "first"), same),
    Mistake(
        "a mask that the library ignores",
        SageAttention,
        "check_boolean_mask",
        (SageAttention, "forward"),
        passing_the_mask,
        Feature.BOOLEAN_MASK,
    ),
    Mistake(
        "unequal lengths under a causal mask", SageAttention, "check_causal_lower_right", declares=Feature.LOWER_RIGHT
    ),
    Mistake(
        "keys changed in place",
        SageAttention,
        "check_inputs_are_unchanged",
        (SageAttention, "forward"),
        on_the_callers_keys,
        library="sage1",
    ),
    Mistake(
        "keys that are not there counted",
        SageAttention,
        "check_values",
        (sage_attention, "_missing_keys"),
        lambda params: 0,
        library="sage1",
    ),
    Mistake(
        "packed sequences of a version that counts such keys",
        SageAttention,
        "check_varlen",
        (SageAttention, "lacks"),
        lambda self, device, dtype: {},
        Feature.VARLEN,
        library="sage1",
    ),
    Mistake(
        "values past the last key as they are",
        FlashAttn3,
        "check_unused_keys_are_not_felt",
        (convert, "existing"),
        tensor_of_the_call,
    ),
    Mistake(
        "values of no sequence as they are",
        FlashAttn4,
        "check_tokens_of_no_sequence",
        (convert, "existing"),
        tensor_of_the_call,
    ),
    Mistake(
        "queries of no sequence in backward",
        FlashAttn3,
        "check_tokens_of_no_sequence",
        (convert, "of_sequences"),
        tensor_of_the_call,
    ),
    Mistake(
        "pages that hold tiles",
        FlashAttn3,
        "check_unused_pages_are_not_felt",
        (convert, "pages_in_pieces"),
        lambda params, tile: params,
    ),
    Mistake("a window with a key too many to the left", FlashAttn2, "check_window", (convert, "band"), shifted(1, 0)),
    Mistake("a window with a key too many to the right", FlashAttn3, "check_window", (convert, "band"), shifted(0, 1)),
    Mistake(
        "slopes of the first sequence for all",
        FlashAttn2,
        "check_alibi_slopes_of_each_sequence",
        (FlashAttn2, "forward"),
        of_the_first_sequence,
    ),
    Mistake(
        "pages in the wrong order", FlashAttn3, "check_paged", (FlashAttn3, "forward"), with_pages(lambda t: t.flip(1))
    ),
    Mistake(
        "a block table read down its columns",
        FlashAttn3,
        "check_paged",
        (FlashAttn3, "forward"),
        with_pages(lambda t: t.T.reshape(t.shape)),
    ),
    Mistake("lse of groups in another order", FlashAttn2, "check_gqa", (FlashAttn2, "forward"), with_lse_by_group),
    Mistake("lse and out exchanged", FlashAttn3, "check_values", (FlashAttn3, "forward"), in_the_order(1, 0)),
    Mistake("a third value returned", FlashAttn3, "check_gradients", (FlashAttn3, "forward"), in_the_order(0, 1, 2)),
    Mistake(
        "the wish for determinism dropped",
        FlashAttn3,
        "check_deterministic_algorithms",
        (torch, "are_deterministic_algorithms_enabled"),
        in_any_order,
    ),
    Mistake("sinks not in lse", FlashInfer, "check_sinks", (convert, "with_sinks"), without_the_sink_in_lse),
    Mistake(
        "no gradient of sinks",
        FlashAttn2,
        "check_sinks_gradient",
        (convert, "gradients_of_sinks"),
        lambda params, *_: (None, torch.zeros_like(params.sinks)) if params.sinks is not None else (),
    ),
    Mistake(
        "a packed window one key too wide",
        XFormers,
        "check_varlen_window",
        (xformers._Sequences, "bias"),
        with_windows_one_key_wider,
    ),
    Mistake(
        "the mean of keys of no sequence",
        SageAttention,
        "check_tokens_of_no_sequence",
        (convert, "outside"),
        keys_as_they_lie,
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_kit_catches_it(monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    library, capabilities, dtype = LIBRARIES[mistake.adapter]
    if mistake.library:
        library, capabilities = mistake.library, specs.SAGE_ATTENTION1
    if mistake.declares is not None:
        promised = frozenset(capabilities.features) | {mistake.declares}
        capabilities = replace(capabilities, features=promised, alternatives=())
    else:  # it is the mistake that the check sees, and nothing else
        register(mistake.adapter(standin(library)), capabilities, "right")
        assert check_impl("right", device="cpu", dtype=dtype, checks=[mistake.check]).passed
    if mistake.place is not None:
        monkeypatch.setattr(*mistake.place, mistake.wrong)
    register(mistake.adapter(standin(library)), capabilities)
    (result,) = check_impl("emulated", device="cpu", dtype=dtype, checks=[mistake.check]).results
    assert result.status == "failed", result
