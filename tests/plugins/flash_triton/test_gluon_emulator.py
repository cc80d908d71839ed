"""The emulator of Gluon kernels finds races, wrong waits and missing fences that are planted in a right kernel.

Each is a change of the source of the backward kernels for Hopper that keeps it running. What finds them, a fault or a
wrong result, must not depend on luck: one seed is enough for all but those that the comment names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from attnplug_flash_triton.hopper import backward, gradients
from gluon_emulator import Fault, mutant
from hopper_gradients import call, error, plan_of

FUSED = dict(size=64, heads=(1, 1), queries=700, keys=200)
DETERMINISTIC = dict(size=64, heads=(1, 1), queries=300, keys=500)
WIDE = dict(size=256, heads=(1, 1), queries=400, keys=300)

WAITED = "        dk, ds = warpgroup_mma_wait(1, deps=(dk_acc, ds))\n"
RELEASED = "        mbarrier.arrive(q_empty.index(stage), count=1)\n"
ASKED = "        mbarrier.wait(p_full.index(turn), (i >> 1) & 1)\n"
KEYS_RELEASED = "        mbarrier.arrive(k_empty.index(of_k), count=1)\n"
STORED = "            store_wait(0)\n"
WRITTEN = "    store_tile(desc, at, buf.reshape(desc.block_type.shape))\n"
FREE = "            mbarrier.wait({}_empty.index(stage), phase)\n"

Changes = tuple[tuple[str, str], ...]
PLANTED: dict[str, tuple[dict[str, Any], Changes]] = {
    "no wait for keys and values": (FUSED, (("    mbarrier.wait(kv_full, 0)\n", ""),)),
    "no wait for the output's gradient": (FUSED, (("        mbarrier.wait(do_full.index(stage), phase)\n", ""),)),
    "no wait for the next queries": (
        FUSED,
        (("            mbarrier.wait(q_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < total)\n", ""),),
    ),
    "no wait for the other warpgroup's dS": (
        FUSED,
        (("            mbarrier.wait(ds_full.index(turn * 2 + OTHER), (i >> 1) & 1)\n", ""),),
    ),
    "the other phase of the other warpgroup's dS": (
        FUSED,
        (("ds_full.index(turn * 2 + OTHER), (i >> 1) & 1)", "ds_full.index(turn * 2 + OTHER), ((i >> 1) & 1) ^ 1)"),),
    ),
    "dS in one buffer instead of two": (
        FUSED,
        (("            turn = i & 1\n", "            turn = 0\n"), ("OTHER), (i >> 1) & 1)", "OTHER), i & 1)")),
    ),
    "no fence after dS": (
        FUSED,
        (("mine.store(ds16)\n            fence_async_shared()\n", "mine.store(ds16)\n"),),
    ),
    "dS announced before it is stored": (
        FUSED,
        (
            ("            mbarrier.arrive(ds_full.index(turn * 2 + MINE), count=1)\n", ""),
            (
                "            mine.store(ds16)\n",
                "            mbarrier.arrive(ds_full.index(turn * 2 + MINE), count=1)\n            mine.store(ds16)\n",
            ),
        ),
    ),
    "queries released before they are multiplied": (
        FUSED,
        (
            (
                "            dq, dk, ds = warpgroup_mma_wait(1, deps=(dq_acc, dk_acc, ds))\n"
                "            mbarrier.arrive(q_empty.index(stage), count=1)\n",
                "            mbarrier.arrive(q_empty.index(stage), count=1)\n"
                "            dq, dk, ds = warpgroup_mma_wait(1, deps=(dq_acc, dk_acc, ds))\n",
            ),
        ),
    ),
    "one warpgroup does not release queries": (
        FUSED,
        (("    " + RELEASED + STORED, "    " + RELEASED.replace("count=1", "count=1, pred=MINE == 0") + STORED),),
    ),
    "no wait for a store before its buffer is written": (
        FUSED,
        (("            store_wait(0)\n            dq_bufs", "            dq_bufs"),),
    ),
    "no wait for the last store": (FUSED, ((WRITTEN + "    store_wait(0)\n", WRITTEN),)),
    "no fence before a store": (
        FUSED,
        ((".store(gradient.to(desc.dtype))\n    fence_async_shared()\n", ".store(gradient.to(desc.dtype))\n"),),
    ),
    "results in a buffer that the other warpgroup reads": (
        FUSED,
        (("    result = v_bufs.index(MINE)  #", "    result = k_bufs.index(MINE)  #"),),
    ),
    "queries loaded into a buffer that is not free": (FUSED, ((FREE.format("q"), ""), (FREE.format("do"), ""))),
    "the other phase of a free buffer": (
        FUSED,
        (("            phase = ((done // STAGES) & 1) ^ 1\n", "            phase = (done // STAGES) & 1\n"),),
    ),
    "fewer bytes expected than arrive": (
        FUSED,
        (("q_full.index(stage), q_desc.block_type.nbytes + row_desc", "q_full.index(stage), row_desc"),),
    ),
    "a product's result used before it is there": (
        FUSED,
        (
            (
                "        dp = warpgroup_mma_wait(1, deps=(dp_acc,))\n",
                "        dp = warpgroup_mma_wait(2, deps=(dp_acc,))\n",
            ),
        ),
    ),
    "dS not announced": (FUSED, (("            mbarrier.arrive(ds_full.index(turn * 2 + MINE), count=1)\n", ""),)),
    "no fence before dQ is added": (
        FUSED,
        (("(_in_order_of_registers(dq))\n            fence_async_shared()\n", "(_in_order_of_registers(dq))\n"),),
    ),
    "both halves of dQ in one buffer": (FUSED, (("dq_bufs.index(MINE)", "dq_bufs.index(0)"),)),
    "fewer keys expected than arrive": (
        FUSED,
        (("mbarrier.expect(kv_full, 2 * GROUPS *", "mbarrier.expect(kv_full, 2 *"),),
    ),
    "queries free as soon as one warpgroup says so": (FUSED, (("barriers(STAGES, 2)", "barriers(STAGES, 1)"),)),
    "the wrong half of dQ": (FUSED, (("slice(MINE * 64, 64, 1)", "slice(OTHER * 64, 64, 1)"),)),
    "one key too few": (dict(FUSED, is_causal=True), (("keys <= queries + high", "keys < queries + high"),)),
    "one query too few": (
        dict(FUSED, queries=300, window=(1, 1)),
        (("gl.minimum(first_key + KEYS, len_k) - low", "gl.minimum(first_key + KEYS, len_k) - low - 1"),),
    ),
    "a tile with one hidden key taken for a whole one": (
        dict(FUSED, window=(-1, 62)),
        (("first_query + high < first_key + KEYS - 1", "first_query + high < first_key + KEYS - 2"),),
    ),
    "keys that do not exist not hidden": (
        dict(FUSED, apart=4.0),
        (("edge = first_key + KEYS > len_k\n", "edge = first_key > len_k\n"),),
    ),
    "no derivative of the softcap": (
        dict(FUSED, softcap=2.0),
        (("            words = packed(p32 * slope, dtype)\n", "            words = words\n"),),
    ),
    "the other phase of the next keys": (
        DETERMINISTIC,
        (("k_full.index(next_k), ((i + 1) // K_STAGES) & 1", "k_full.index(next_k), (i // K_STAGES) & 1"),),
    ),
    "no wait for values of the next tile": (
        DETERMINISTIC,
        (("        mbarrier.wait(v_full.index(next_v), ((i + 1) // V_STAGES) & 1, pred=i + 1 < total)\n", ""),),
    ),
    "keys released before they are multiplied": (
        DETERMINISTIC,
        (
            ("        mbarrier.arrive(k_empty.index(of_k), count=1)\n", ""),
            (
                "        s, dp, dq, ds = warpgroup_mma_wait(0,",
                "        mbarrier.arrive(k_empty.index(of_k), count=1)\n        s, dp, dq, ds = warpgroup_mma_wait(0,",
            ),
        ),
    ),
    "the next keys released in place of the current ones": (
        DETERMINISTIC,
        ((KEYS_RELEASED, KEYS_RELEASED.replace("of_k", "next_k")),),
    ),
    "probabilities of all rounds in one buffer": (
        WIDE,
        (("p_bufs.index(turn)", "p_bufs.index(0)"),),
    ),
    "queries released as soon as probabilities are asked for": (
        WIDE,
        ((WAITED + RELEASED, WAITED), (ASKED, RELEASED + ASKED)),
    ),
    "probabilities announced before they are stored": (
        WIDE,
        (
            ("        mbarrier.arrive(p_full.index(turn), count=1)\n", ""),
            (
                "        # The probabilities of two",
                "        mbarrier.arrive(p_full.index(turn), count=1)\n        # The probabilities of two",
            ),
        ),
    ),
    "probabilities read before they are written": (
        WIDE,
        (("        mbarrier.wait(p_full.index(turn), (i >> 1) & 1)\n", ""),),
    ),
    "results in a buffer that products still read": (
        WIDE,
        (("    store_gradient(k_bufs.index(0), dv,", "    store_gradient(v_bufs.index(0), dv,"),),
    ),
    "queries released before dK": (WIDE, ((WAITED + RELEASED, RELEASED + WAITED),)),
}


@pytest.mark.parametrize(
    "arguments", {str(arguments): arguments for arguments, _ in PLANTED.values()}.values(), ids=str
)
def test_nothing_is_found_where_nothing_is_planted(arguments: dict[str, Any]) -> None:
    made = call(**arguments)
    assert error(made, plan_of(made, deterministic=arguments is DETERMINISTIC), seed=1) < 1e-4


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, changes = PLANTED[name]
    made = call(**arguments)
    deterministic = arguments is DETERMINISTIC
    monkeypatch.setattr(gradients, "kernels", mutant(backward, tmp_path, *changes))
    try:
        found = error(made, plan_of(made, deterministic=deterministic), seed=1) > 1e-4
    except Fault:
        found = True
    assert found


def test_a_change_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no 'mbarrier.hold'"):
        mutant(backward, tmp_path, ("mbarrier.hold", ""))
