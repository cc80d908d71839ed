"""The forward kernel for Hopper gives out and lse of the formulas, in the emulator of Gluon kernels.

There, accesses to shared memory that barriers do not order are faults. See `gluon_emulator`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_emulator
from attnplug import SDPAParams
from attnplug_flash_triton import launches
from attnplug_flash_triton.hopper import choose, outputs
from attnplug_flash_triton.hopper import forward as kernels
from attnplug_flash_triton.problem import Machine
from gluon_emulator import launching
from hopper_gradients import Call, call, order

FEW_PROCESSORS = Machine("sm_90", 3)
"""So that a program has several tiles of queries."""
HALVES = ("query", "key", "value")
LARGEST = 2e-5
"""Of an error in float32."""

CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "whole tiles": dict(queries=256, keys=256),
    "one key": dict(queries=70, keys=1),
    "upper left": dict(is_causal=True),
    "lower right": dict(is_causal=True, lower_right=True),
    "more queries than keys": dict(queries=300, keys=100, is_causal=True, lower_right=True),
    "window": dict(window=(50, 20), lower_right=True),
    "wide window": dict(queries=300, keys=500, window=(260, -1), lower_right=True, is_causal=True),
    "left side": dict(window=(62, -1)),  # hides one key from one row of a tile; so does the next
    "right side": dict(window=(-1, 62)),
    "neighbours": dict(queries=300, window=(1, 1)),  # one row sees one key of a tile
    "softcap": dict(softcap=2.0),
    "softcap, negative scale": dict(softcap=2.0, scale=-0.3),
    "sinks": dict(sinks=True, is_causal=True),
    "used keys": dict(used=(130, 0, 300), is_causal=True, lower_right=True),
    "used keys, full": dict(used=(130, 0, 300)),
    "variable length": dict(lengths=((1, 5), (200, 64), (0, 10), (64, 200)), behind=(70, 5), is_causal=True),
    "variable length, full": dict(lengths=((1, 5), (200, 64), (40, 0), (64, 200))),
    "variable length, window and sinks": dict(lengths=((3, 300), (200, 64)), window=(60, 10), sinks=True),
    "negative scale": dict(scale=-0.2),
    "heads last": dict(heads_last=True),
}
QUICK = {
    *((64, name) for name in CALLS),
    *((128, name) for name in ("full", "window", "variable length")),
    *((256, name) for name in ("full", "lower right", "variable length")),
}
QUICK_JOINED = {
    *((64, name) for name in CALLS),
    *((128, name) for name in ("full", "window", "variable length, full")),
}
APART = {*((256, name) for name in CALLS), (64, "left side")}
"""Those of which tiles are not joined."""


def cases(quick: set[tuple[int, str]]) -> list[Any]:
    """Return each call of each size, in one of the orders; those that are not quick are marked."""
    return [
        pytest.param(size, name, order(i, j), marks=() if (size, name) in quick else pytest.mark.slow)
        for (i, size), (j, name) in product(enumerate((64, 128, 256)), enumerate(CALLS))
    ]


@pytest.fixture(autouse=True)
def _three_warpgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three run the calls of head size 64, which are short here, so that two would."""
    monkeypatch.setattr(outputs, "SPARE_ROWS", 10.0)


def error(made: Call, seed: int = 0, join: bool = False) -> float:
    """Return the largest error of out and lse; inf where one is infinite and the other is not."""
    assert outputs.reasons(made.params) == []
    plan = outputs.forward(made.params, FEW_PROCESSORS, join)
    assert plan.launches[0].compiled_in["JOINED"] is join
    got = gluon_emulator.run_plan(plan, made.given, seed, HALVES)
    errors = []
    for x, want in zip(got, (made.given["out"], made.given["lse"]), strict=True):
        assert torch.equal(torch.isneginf(x), torch.isneginf(want))
        errors.append(torch.where(x == want, 0.0, (x - want).abs()).max().item())
    return max(errors)


@pytest.mark.parametrize(("size", "name", "seed"), cases(QUICK))
def test_out_and_lse_are_those_of_the_formulas(size: int, name: str, seed: int) -> None:
    assert error(call(size, **CALLS[name]), seed) < LARGEST


@pytest.mark.parametrize(
    ("size", "name", "seed"), [case for case in cases(QUICK_JOINED) if case.values[:2] not in APART]
)
def test_joined_tiles_give_the_same(size: int, name: str, seed: int) -> None:
    assert error(call(size, **CALLS[name]), seed, join=True) < LARGEST


@pytest.mark.parametrize("name", ["full", "upper left"])
def test_joined_tiles_of_two_warpgroups_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert error(call(64, **CALLS[name]), join=True) < LARGEST


@pytest.mark.parametrize(("stages", "joins"), [(1, False), (2, True)])
def test_tiles_are_joined_only_where_there_are_buffers_for_what_is_held_between_them(
    stages: int, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two warpgroups, and 128 keys in a tile, that is a tile's last values, and of a window those behind them."""
    monkeypatch.setitem(outputs.TILES, (128, "bounded"), outputs.TILES[128, "bounded"]._replace(stages=stages))
    plan = outputs.forward(call(128, window=(1500, 0)).params, FEW_PROCESSORS, join=True)
    assert plan.launches[0].compiled_in["JOINED"] is joins


@pytest.mark.parametrize(("size", "options"), [(256, {}), (64, dict(window=(1500, 0)))])
def test_tiles_with_too_little_shared_memory_or_too_few_registers_are_not_joined(
    size: int, options: dict[str, Any]
) -> None:
    plan = outputs.forward(call(size, **options).params, FEW_PROCESSORS, join=True)
    assert plan.launches[0].compiled_in["JOINED"] is False


@pytest.mark.parametrize("name", ["full", "window", "variable length"])
def test_two_warpgroups_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert error(call(64, **CALLS[name])) < LARGEST


@pytest.mark.parametrize(("queries", "warpgroups"), [(64, 2), (192, 3), (384, 3), (1024, 2), (1536, 3), (8192, 3)])
def test_two_warpgroups_run_what_three_would_not_fill(
    queries: int, warpgroups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    query = torch.empty(1, 1, queries, 64, dtype=torch.bfloat16)
    (launch,) = outputs.forward(SDPAParams(query, query, query, scale=0.1), FEW_PROCESSORS).launches
    assert launch.compiled_in["CONSUMERS"] == warpgroups


@pytest.mark.parametrize(
    ("window", "is_causal", "keys"),
    [((1024, 0), False, 64), ((1024, -1), True, 64), ((512, 513), False, 128), ((9, -1), False, 128)],
)
def test_narrow_windows_have_narrow_tiles(window: tuple[int, int], is_causal: bool, keys: int) -> None:
    query = torch.empty(1, 1, 4096, 64, dtype=torch.bfloat16)
    params = SDPAParams(query, query, query, scale=0.1, window_size=window, is_causal=is_causal)
    (launch,) = outputs.forward(params, FEW_PROCESSORS).launches
    assert launch.compiled_in["BLOCK_N"] == keys


@pytest.mark.parametrize(("size", "size_v"), [(40, 40), (80, 24), (72, 200), (192, 128)])
def test_head_sizes_between_are_padded(size: int, size_v: int) -> None:
    assert error(call(size, size_v, queries=70, keys=140, is_causal=True)) < LARGEST


def test_groups_of_query_heads_share_keys() -> None:
    assert error(call(64, heads=(6, 2), queries=100, keys=130, is_causal=True)) < LARGEST


def test_maxima_that_grow_much_rescale_what_was_summed() -> None:
    """Keys of later tiles, which come first, have small logits; those of earlier ones are hundreds larger."""
    made = call(64, queries=70, keys=400, scale=3.0, is_causal=True, lower_right=True)
    made.given["key"].mul_(torch.linspace(4, 0.01, 400)[:, None])
    q, k, v = (made.given[name].double() for name in HALVES)
    logits = 3.0 * q @ k.repeat_interleave(2, 1).mT
    logits = logits.masked_fill(~torch.ones(70, 400, dtype=torch.bool).tril(330), -torch.inf)
    made.given["out"] = (torch.softmax(logits, -1) @ v.repeat_interleave(2, 1)).float()
    made.given["lse"] = logits.logsumexp(-1).float()
    assert error(made) < 1e-3  # logits of hundreds, in float32


PLANTED = {
    "keys are not waited for": ("    mbarrier.wait(k.full.index(at_k), (i // config.STAGES) & 1)\n", ""),
    "values are not waited for": ("    mbarrier.wait(v.full.index(at_v), ((i - 1) // config.STAGES) & 1)\n", ""),
    "keys are released before they are multiplied": (
        "    mbarrier.wait(v.full.index(at_v), ((i - 1)",
        "    mbarrier.arrive(k.empty.index(at_k), count=1)\n    mbarrier.wait(v.full.index(at_v), ((i - 1)",
    ),
    "values are released before they are multiplied": (
        "    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))\n    mbarrier.arrive(v.empty.index(at_v)",
        "    mbarrier.arrive(v.empty.index(at_v), count=1)\n"
        "    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))\n"
        "    mbarrier.arrive(v.empty.index(at_v), pred=False",
    ),
    "the last values are not waited for": ("    mbarrier.wait(v.full.index(at), (last // config.STAGES) & 1)\n", ""),
    "queries are not waited for": (
        "    mbarrier.wait(work.q.full.index(at_q), (turn // config.Q_STAGES) & 1)\n",
        "",
    ),
    "queries are not released": (
        "    if config.OWN_OUT:\n        mbarrier.arrive(work.q.empty.index(at_q), count=1)\n",
        "",
    ),
    "keys are free as soon as one warpgroup says so": (
        "(k_empty.index(i), count=CONSUMERS)",
        "(k_empty.index(i), count=1)",
    ),
    "the loading warp does not wait for free buffers": (
        "    mbarrier.wait(ring.empty.index(at), ((place // config.STAGES) & 1) ^ 1)\n",
        "",
    ),
    "outputs are not fenced": ("    fence_async_shared()\n", ""),
    "scores are used before the product is over": (
        "    s = warpgroup_mma_wait(1, deps=(s_acc,))\n    mbarrier",
        "    s = warpgroup_mma_wait(2, deps=(s_acc,))\n    mbarrier",
    ),
    "outputs are overwritten while they are stored": (
        "    if config.OWN_OUT:\n        store_wait(0)\n",
        "    if config.OWN_OUT:\n",
    ),
    "tiles before a window are not released": (
        "    pass_over(work, done, done + rows.begin - begin_all, config)",
        "    pass_over(work, done, done, config)",
    ),
    "where the next tile is, is not waited for": (
        "    mbarrier.wait(work.queue.full.index(slot), (turn // AHEAD) & 1)\n",
        "",
    ),
    "where a tile is, is overwritten before all have read it": (
        "    mbarrier.wait(queue.empty.index(slot), ((turn // AHEAD) & 1) ^ 1)\n",
        "",
    ),
    "where a tile is, is released before it is read": (
        "        tile = handed(turn, work, 4)\n"
        "        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)\n    else:\n        tile",
        "        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)\n"
        "        tile = handed(turn, work, 4)\n    else:\n        tile",
    ),
    "where the next tile is, is told with this one's turn": (
        'gl.atomic_add(work.queue.counter, 1, sem="relaxed"), turn + 1,',
        'gl.atomic_add(work.queue.counter, 1, sem="relaxed"), turn,',
    ),
}  # fmt: skip


PLANTED_IN_JOINED = {
    "the first keys of a tile are not waited for": (
        "            mbarrier.wait(k.full.index(at_k), (first // config.STAGES) & 1)\n",
        "",
    ),
    "the last values of a tile are not waited for": (
        "            mbarrier.wait(v.full.index(at_v), (last // config.STAGES) & 1)\n",
        "",
    ),
    "the next queries are not waited for": (
        "            mbarrier.wait(work.q.full.index(at_q), (following // config.Q_STAGES) & 1)\n",
        "",
    ),
    "queries are not released": (
        "                mbarrier.arrive(work.q.empty.index(at_q), count=1)\n",
        "                pass\n",
    ),
    "queries are released before the last round": (
        "            whole_begin, whole_end = whole(rows, config)\n",
        "            whole_begin, whole_end = whole(rows, config)\n"
        "            mbarrier.arrive(work.q.empty.index(at_q), count=1)\n",
    ),
    "the first keys of a tile are not released": (
        "                mbarrier.arrive(k.empty.index(at_k), count=1)\n",
        "                pass\n",
    ),
    "the first keys of a tile are released before they are multiplied": (
        "            s = warpgroup_mma_wait(1, deps=(s_acc,))\n"
        "            if is_there:\n"
        "                mbarrier.arrive(k.empty.index(at_k), count=1)\n",
        "            if is_there:\n"
        "                mbarrier.arrive(k.empty.index(at_k), count=1)\n"
        "            s = warpgroup_mma_wait(1, deps=(s_acc,))\n",
    ),
    "the last values of a tile are released before they are multiplied": (
        "            o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))\n"
        "            mbarrier.arrive(v.empty.index(at_v), count=1)\n",
        "            mbarrier.arrive(v.empty.index(at_v), count=1)\n"
        "            o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))\n",
    ),
    "scores are used before the product is over": (
        "            s = warpgroup_mma_wait(1, deps=(s_acc,))\n            if is_there:",
        "            s = warpgroup_mma_wait(2, deps=(s_acc,))\n            if is_there:",
    ),
    "keys that only other warpgroups see are not released": (
        "                pass_over_keys(work, done, done + between, config)\n",
        "",
    ),
    "values that only other warpgroups see are not released": (
        "                pass_over_values(work, done, done + between, config)\n",
        "",
    ),
    "outputs are overwritten while they are stored": (
        "            store_wait(0)\n            written = work.o_buffers",
        "            written = work.o_buffers",
    ),
    "outputs are not fenced": ("    fence_async_shared()\n", ""),
    "where the next tile is, is released before it is read": (
        "        tile = handed(turn, work, 4)\n"
        "        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)\n    else:\n        at = ",
        "        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)\n"
        "        tile = handed(turn, work, 4)\n    else:\n        at = ",
    ),
}


def assert_found(made: Call, change: tuple[str, str], join: bool, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Assert that the emulator finds a fault in the kernel with one text changed."""
    faulty = launching.mutant(kernels, folder, change)
    patch.setattr(outputs, "forward_kernel", faulty.forward_kernel)
    with pytest.raises(gluon_emulator.Fault):
        for seed in range(6):
            error(made, seed, join)


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED)
def test_planted_faults_are_found(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call(64, lengths=((1, 5), (400, 700), (0, 10), (64, 200)), window=(150, 20))
    assert_found(made, change, False, tmp_path, monkeypatch)


@pytest.mark.parametrize("change", PLANTED_IN_JOINED.values(), ids=PLANTED_IN_JOINED)
def test_faults_planted_in_joined_tiles_are_found(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = call(64, lengths=((1, 5), (400, 700), (0, 10), (64, 200)), window=(150, 20))
    assert_found(made, change, True, tmp_path, monkeypatch)


def test_few_rows_run_on_the_plain_kernel_which_splits_keys() -> None:
    made = call(64, heads=(4, 1), queries=2, keys=3000)
    assert outputs.reasons(made.params) == [
        "8 rows for each head of keys are few: the plain kernel packs them, and splits the keys"
    ]
    plan = choose.forward(made.params, Machine("sm_90", 132))
    assert plan.launches[0].kernel is launches.forward_kernel


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float32), "dtype torch.float32 is neither float16 nor bfloat16"),
        (dict(size=100), "query: head size 100 is not a multiple of 8"),
        (dict(attn_mask=torch.ones(1, 1, 80, 80, dtype=torch.bool)), "has no attn_mask"),
        (dict(alibi_slopes=torch.ones(2)), "has no alibi_slopes"),
        (dict(block_table=torch.zeros(1, 8, dtype=torch.int32)), "has no block_table"),
        (dict(value=torch.zeros(1, 2, 80, 20).half()), "value: head size 20 is not a multiple of 8"),
        (dict(dropout=0.1), "has no dropout"),
        (dict(scale=0.0), "has no scale of 0, by which hidden logits would be NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_runs_on_the_plain_kernel_says_why(change: dict[str, Any], reason: str) -> None:
    size, dtype = change.pop("size", 64), change.pop("dtype", torch.bfloat16)
    query, key, value = (torch.zeros(1, 2, 80, size, dtype=dtype) for _ in range(3))
    params = replace(call().params, **dict(query=query, key=key, value=value) | change)
    assert reason in choose.reasons_forward(params)
    assert choose.reasons_forward(call().params) == []


def test_the_environment_keeps_hoppers_own_kernels_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_TRITON_HOPPER", "0")
    assert choose.reasons_forward(call().params) == ["FLASH_TRITON_HOPPER=0 keeps Hopper's own kernels from running"]
    assert choose.reasons_backward(call().params) == choose.reasons_forward(call().params)
    monkeypatch.setenv("FLASH_TRITON_HOPPER", "1")
    assert choose.reasons_forward(call().params) == choose.reasons_backward(call().params) == []


@pytest.mark.parametrize(("wish", "joins"), [("", False), ("1", True)])
def test_tiles_are_joined_only_where_the_environment_asks_for_it(
    wish: str, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_TRITON_HOPPER", wish)
    plan = choose.forward(call().params, FEW_PROCESSORS)
    assert plan.launches[0].compiled_in["JOINED"] is joins


def test_a_wish_that_means_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_TRITON_HOPPER", "yes")
    with pytest.raises(ValueError, match=r"FLASH_TRITON_HOPPER='yes' is neither 0 .* nor 1 "):
        choose.are_allowed()
