"""Backward calls of flash_triton's kernels for Hopper, run in the emulator and held against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import gluon_emulator
from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import impl
from attnplug_flash_triton.hopper import gradients
from attnplug_flash_triton.problem import Machine

HOPPER = Machine("sm_90", 132)
WITH_ONE_PROCESSOR = Machine("sm_90", 1)
"""Never short of programs: query heads of a group stay together."""
NAMES = ("query", "key", "value")


def order(kernel: int, call: int) -> int:
    """Return one of the six seeds of orders, for a call of a kernel: each kernel meets all six.

    One is enough for a call, because whether a fault is found does not depend on the order; see
    `test_gluon_emulator.py`.
    """
    return (2 * kernel + call) % 6


class Call(NamedTuple):
    """A call and its tensors.

    Attributes:
        params: as an implementation gets them, tensors in bfloat16 whose values nobody reads.
        given: the tensors in float32, as plans name them.
        want: the gradients of query, key and value, float64.
    """

    params: SDPAParams
    given: dict[str, Tensor]
    want: tuple[Tensor, ...]


def call(
    size: int = 64,
    size_v: int | None = None,
    heads: tuple[int, int] = (2, 1),
    queries: int = 200,
    keys: int = 300,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    lower_right: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: bool = False,
    used: tuple[int, ...] | None = None,
    lengths: tuple[tuple[int, int], ...] | None = None,
    behind: tuple[int, int] = (0, 0),
    grad_lse: bool = False,
    heads_last: bool = False,
    apart: float = 0.0,
) -> Call:
    """Return a call; `lengths` has the numbers of queries and keys of each sequence of a call of variable length.

    `behind` are those that no sequence has. They are NaN, and what is wanted of them is what no key gives.
    Keys and values that are not used hold NaN. At head size 64 elements of queries are about `apart`, and those of keys
    `-apart`; at others as far apart that logits, whose rounding grows with them, are as far below 0.
    """
    apart *= (64 / size) ** 0.25
    size_v, scale = size_v or size, size**-0.5 if scale is None else scale
    pairs = lengths or [(queries, keys)] * len(used or (0,))
    random = torch.Generator().manual_seed(3)
    parts = [
        tuple(
            torch.randn(head, length, columns, generator=random, dtype=torch.float64)
            for head, length, columns in ((heads[0], q, size), (heads[1], k, size), (heads[1], k, size_v))
        )
        for q, k in pairs
    ]
    for q_part, k_part, v_part in parts:
        q_part += apart
        k_part -= apart
        for part in (q_part, k_part, v_part):
            part.requires_grad_()
    sink = torch.linspace(-1, 2, heads[0], dtype=torch.float64) if sinks else None
    outs, lses, grads_out, grads_lse = [], [], [], []
    for i, (q, k, v) in enumerate(parts):
        length = used[i] if used else k.shape[1]
        offset = length - q.shape[1] if lower_right or lengths else 0
        seen = _seen(q.shape[1], k.shape[1], length, offset, window[0], 0 if is_causal else window[1])
        out, lse = attention(q, k, v, scale, softcap, seen, sink)
        grads_out.append(torch.randn(out.shape, generator=random, dtype=torch.float64))
        grads_lse.append(torch.randn(lse.shape, generator=random, dtype=torch.float64) * grad_lse)
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        ((out * grads_out[-1]).sum() + (finite * grads_lse[-1]).sum()).backward()
        outs.append(out.detach())
        lses.append(lse.detach())
    together: Callable[[list[Tensor]], Tensor]
    together = (lambda x: torch.cat(x, 1).transpose(0, 1).contiguous()) if lengths else torch.stack
    rows: Callable[[list[Tensor]], Tensor] = (lambda x: torch.cat(x, 1)) if lengths else torch.stack
    tensors = {name: together([part[n].detach() for part in parts]).float() for n, name in enumerate(NAMES)}
    if heads_last:
        tensors = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    for i, length in enumerate(used or ()):
        tensors["key"][i, :, length:] = tensors["value"][i, :, length:] = torch.nan
    extra: dict[str, Any] = {}
    if used:
        extra["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    if lengths:
        starts = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
        extra |= dict(zip(("cu_seq_q", "cu_seq_k"), starts.T.contiguous(), strict=True))
        extra |= dict(zip(("max_q", "max_k"), (max(side) for side in zip(*lengths, strict=True)), strict=True))
    params = SDPAParams(
        *(tensors[name].bfloat16() for name in NAMES),
        is_causal=is_causal,
        enable_gqa=True,
        scale=scale,
        causal_variant=CausalVariant.LOWER_RIGHT if lower_right or lengths else CausalVariant.UPPER_LEFT,
        window_size=window,
        softcap=softcap,
        sinks=None if sink is None else sink.float().requires_grad_(),
        **extra,
    )
    given = {**impl.tensors_of(params), **tensors, "grad_out": together(grads_out).float()}
    given |= {"out": together(outs).float(), "lse": rows(lses).float()}
    if grad_lse:
        given["grad_lse"] = rows(grads_lse).float()
    want = [together([part[n].grad for part in parts]) for n in range(3)]
    if lengths:
        given |= {name: _longer(given[name], behind[0]) for name in ("query", "grad_out")}
        given |= {name: _longer(given[name], behind[1]) for name in ("key", "value")}
        given |= {"out": _longer(given["out"], behind[0], 0.0), "lse": _longer(given["lse"].T, behind[0], -torch.inf).T}
        given["lse"] = given["lse"].contiguous()
        params = replace(params, **{name: given[name].bfloat16() for name in NAMES})
        want = [_longer(grad, behind[n > 0], 0.0) for n, grad in enumerate(want)]
    return Call(params, given, tuple(want))


def _longer(tensor: Tensor, rows: int, value: float = torch.nan) -> Tensor:
    return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), value)])


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, seen: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out and lse of one sequence, by the formulas."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    logits = q @ k.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    everything = logits
    if sink is not None:
        everything = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:2], 1)], -1)
    lse = torch.logsumexp(everything, -1)
    shift = torch.where(lse == -torch.inf, torch.inf, lse)
    return torch.exp(logits - shift[..., None]) @ v, lse


def _seen(queries: int, keys: int, length: int, offset: int, left: int, right: int) -> Tensor:
    i, j = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    seen = (j < length).expand(queries, keys).clone()
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def plan_of(made: Call, machine: Machine = HOPPER, deterministic: bool = False) -> Any:
    """Return the plan of a call, as if its tensors were in bfloat16.

    What PyTorch is asked for is patched: to ask it for determinism imports its compiler.
    """
    grad_out, out = (made.given[name].bfloat16() for name in ("grad_out", "out"))
    with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=deterministic):
        return gradients.backward(made.params, machine, grad_out, made.given.get("grad_lse"), out, made.given["lse"])


def error(made: Call, plan: Any, seed: int) -> float:
    """Return the largest error of the gradients, relative to its largest element; inf if one is NaN, or delta is."""
    got = gluon_emulator.run_plan(plan, made.given, seed, halves=(*NAMES, "grad_out", "out"))
    errors = [
        ((x - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()
        for x, want in zip(got[:3], made.want, strict=True)
    ]
    errors.append(0.0 if got[3].isfinite().all() else torch.inf)  # delta, which is summed for the gradient of sinks
    return max(error if error == error else torch.inf for error in errors)
