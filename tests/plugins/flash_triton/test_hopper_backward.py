"""The backward kernels for Hopper give the gradients of the formulas, in the emulator of Gluon kernels.

There, accesses to shared memory that barriers do not order are faults. See `gluon_emulator`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import hopper_gradients
from attnplug import Feature
from attnplug_flash_triton import impl
from attnplug_flash_triton.hopper import gradients
from hopper_gradients import HOPPER, WITH_ONE_PROCESSOR, call, error, order, plan_of

LARGEST = 1e-4
"""Of an error in float32, relative to the largest element."""

KERNELS = {
    "64-fused": (64, False),
    "128-fused": (128, False),
    "64-deterministic": (64, True),
    "128-deterministic": (128, True),
    "256": (256, False),
}
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "whole tiles": dict(queries=256, keys=256),
    "one query": dict(queries=1, keys=5),
    "upper left": dict(is_causal=True),
    "lower right": dict(is_causal=True, lower_right=True),
    "more queries than keys": dict(queries=300, keys=100, is_causal=True, lower_right=True),
    "window": dict(window=(50, 20), lower_right=True),
    "left side": dict(window=(62, -1)),  # hides one key from one row of a tile; so does the next
    "right side": dict(window=(-1, 62)),
    "neighbours": dict(queries=300, window=(1, 1)),  # one row sees one key of a tile
    "softcap": dict(softcap=2.0),
    "softcap, causal": dict(softcap=2.0, is_causal=True),
    "sinks": dict(sinks=True, is_causal=True),
    "used keys": dict(used=(130, 0, 300), is_causal=True, lower_right=True),
    "variable length": dict(lengths=((1, 5), (200, 64), (0, 10), (64, 200)), behind=(70, 5), is_causal=True),
    "negative scale": dict(scale=-0.2),
    "scale 0": dict(scale=0.0),
    "gradient of lse": dict(grad_lse=True),
    "logits far below 0": dict(apart=4.0),
    "heads last": dict(heads_last=True),
}
QUICK = {
    *(("64-fused", name) for name in CALLS),
    *(("64-deterministic", name) for name in ("full", "lower right", "neighbours", "used keys", "variable length")),
    *((kernel, "window") for kernel in ("128-fused", "128-deterministic")),
    *(("256", name) for name in ("lower right", "softcap, causal")),
}
CASES = [
    pytest.param(
        *KERNELS[kernel],
        name,
        order(i, j),
        marks=() if (kernel, name) in QUICK else pytest.mark.slow,
        id=f"{kernel}-{name}",
    )
    for (i, kernel), (j, name) in product(enumerate(KERNELS), enumerate(CALLS))
]


@pytest.mark.parametrize(("size", "deterministic", "name", "seed"), CASES)
def test_gradients_are_those_of_the_formulas(size: int, deterministic: bool, name: str, seed: int) -> None:
    made = call(size, **CALLS[name])
    assert error(made, plan_of(made, deterministic=deterministic), seed) < LARGEST


@pytest.mark.parametrize("machine", [HOPPER, WITH_ONE_PROCESSOR], ids=["heads apart", "heads together"])
def test_groups_of_query_heads_share_keys(machine: Any) -> None:
    made = call(64, heads=(6, 2), queries=100, keys=130, is_causal=True)
    assert error(made, plan_of(made, machine), seed=0) < LARGEST


@pytest.mark.parametrize(("size", "size_v"), [(40, 40), (80, 24), (72, 200)])
def test_head_sizes_between_are_padded(size: int, size_v: int) -> None:
    made = call(size, size_v, queries=70, keys=140, is_causal=True)
    assert error(made, plan_of(made), seed=0) < LARGEST


def test_delta_leaves_the_gradient_of_sinks_to_be_taken() -> None:
    """Delta is the sum of `out * grad_out` less the gradient of lse, of each row."""
    made = call(sinks=True, grad_lse=True)
    plan = plan_of(made)
    *_, delta = hopper_gradients.gluon_emulator.run_plan(plan, made.given, halves=("query", "key", "value", "grad_out"))
    want = (made.given["out"] * made.given["grad_out"]).sum(-1) - made.given["grad_lse"]
    torch.testing.assert_close(delta, want)


def test_additions_in_no_order_are_left_out_where_pytorch_wants_determinism() -> None:
    made = call(128)
    names = {step.kernel.__name__ for step in plan_of(made, deterministic=True).launches}
    assert names == {"rows_kernel", "key_gradients_kernel", "add_heads_kernel", "query_gradient_kernel"}
    assert "gather_kernel" in {step.kernel.__name__ for step in plan_of(made).launches}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float32), "dtype torch.float32 is neither float16 nor bfloat16"),
        (dict(size=100), "query: head size 100 is not a multiple of 8"),
        (dict(attn_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)), "has no attn_mask"),
        (dict(alibi_slopes=torch.ones(2)), "has no alibi_slopes"),
        (dict(dropout=0.1), "has no dropout"),
        (dict(expand=True), "key: strides (512, 0, 64, 1) are not all positive multiples of 8"),
        (dict(offset=1), "query: its data does not start at a multiple of 16 bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_runs_on_the_plain_kernels_says_why(change: dict[str, Any], reason: str) -> None:
    size, dtype = change.pop("size", 64), change.pop("dtype", torch.bfloat16)
    expand, offset = change.pop("expand", False), change.pop("offset", 0)
    query, key, value = (torch.zeros(1, 2, 8, size, dtype=dtype) for _ in range(3))
    if expand:
        key = torch.zeros(1, 1, 8, size, dtype=dtype).expand(1, 2, 8, size)
    if offset:
        query = torch.zeros(query.numel() + offset, dtype=dtype)[offset:].view(query.shape)
    params = replace(call().params, query=query, key=key, value=value, **change)
    assert reason in gradients.reasons(params)
    assert not gradients.reasons(call().params)


def test_a_gradient_that_tma_cannot_read_runs_on_the_plain_kernels() -> None:
    """One that is not contiguous is copied; one that is would not be."""
    made = call()
    grad = made.given["out"].bfloat16()
    assert not gradients.reasons(made.params, grad)
    assert not gradients.reasons(made.params, grad[..., :1].expand(grad.shape))
    elsewhere = torch.zeros(grad.numel() + 1, dtype=grad.dtype)[1:].view(grad.shape)
    assert gradients.reasons(made.params, elsewhere) == ["grad_out: its data does not start at a multiple of 16 bytes"]


@pytest.mark.parametrize(
    ("capability", "variable", "dtype", "lacking"),
    [
        ((9, 0), "", torch.bfloat16, True),
        ((9, 0), "", torch.float32, False),
        ((9, 0), "0", torch.bfloat16, False),
        ((8, 0), "", torch.bfloat16, False),
    ],
)
def test_equal_bits_are_said_to_be_lacking_where_additions_have_no_order(
    capability: tuple[int, int], variable: str, dtype: torch.dtype, lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impl, "compute_capability", lambda device: capability)
    monkeypatch.setenv("FLASH_TRITON_HOPPER", variable)
    assert set(impl.lacks(torch.device("cuda"), dtype)) == ({Feature.DETERMINISTIC} if lacking else set())
