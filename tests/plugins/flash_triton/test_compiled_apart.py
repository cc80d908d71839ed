"""What kernels of flash_triton are kept under, once compiled, tells apart all that Triton itself tells apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.runtime import driver

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import impl, launches, plans
from attnplug_flash_triton.hopper import choose
from attnplug_flash_triton.problem import Machine

HOPPER = Machine("sm_90", 132)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton take the GPU to be Hopper's, and nothing ask CUDA for it."""
    named = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", named)
    monkeypatch.setattr(choose, "_kept_out", list)
    monkeypatch.setattr(plans, "bind_cuda_context", lambda: None)


def looked_at_by_triton(launch: plans.Launch, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return what Triton's own binder makes of a launch: the types, what it specialises, what is compiled in."""
    *_, binder = launch.kernel.create_binder()
    _, looked_at, options = binder(*launch.bound(tensors), **launch.compiled_in)
    return launch.kernel.__name__, str(looked_at), str(options)


def made(pick: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that may start anywhere, and lie in a larger one, apart or not."""
    start, room, step = pick.choice((0, 0, 0, 8, 1)), pick.choice((0, 0, 8, 3)), pick.choice((1, 1, 1, 1, 2))
    *outer, size = shape
    width = size * step + room
    whole = torch.zeros(start + torch.Size(outer).numel() * width, dtype=dtype)[start:]
    return whole.view(*outer, width)[..., : size * step : step]


def length(pick: random.Random) -> int:
    return pick.choice((1, 2, 15, 16, 17, 32, 48, 100, 128, 272, 1000))


def dense(pick: random.Random) -> SDPAParams:
    dtype, size = pick.choice((torch.float16, torch.bfloat16, torch.float32)), pick.choice((16, 40, 64, 100, 128))
    heads, batch, queries, keys = pick.choice((1, 2, 4)), pick.choice((1, 2, 16)), length(pick), length(pick)
    query = made(pick, (batch, heads * pick.choice((1, 2)), queries, size), dtype)
    key, value = (made(pick, (batch, heads, keys, size), dtype) for _ in range(2))
    mask = None
    if pick.random() < 0.3:
        mask = made(pick, (pick.choice((1, batch)), 1, queries, keys), pick.choice((torch.bool, dtype)))
        mask = mask.expand(batch, -1, -1, -1)
    dropout = pick.choice((0.0, 0.0, 0.5))
    return with_options(pick, SDPAParams(query, key, value, mask, dropout, scale=0.1, enable_gqa=True))


def packed(pick: random.Random) -> SDPAParams:
    dtype, size = pick.choice((torch.float16, torch.bfloat16, torch.float32)), pick.choice((64, 128))
    queries, keys, heads = length(pick), length(pick), pick.choice((1, 2))
    query = made(pick, (queries, heads * pick.choice((1, 4)), size), dtype)
    key, value = (made(pick, (keys, heads, size), dtype) for _ in range(2))
    of_sequences: dict[str, Any] = {"max_q": queries, "max_k": keys, "enable_gqa": True}
    for name, number in (("cu_seq_q", queries), ("cu_seq_k", keys)):
        of_sequences[name] = made(pick, (3,), torch.int32).copy_(torch.tensor([0, number // 2, number]))
    if pick.random() < 0.3:
        of_sequences["seqused_k"] = made(pick, (2,), torch.int32)
    params = SDPAParams(query, key, value, scale=0.1, causal_variant=CausalVariant.LOWER_RIGHT, **of_sequences)
    return with_options(pick, params)


def with_options(pick: random.Random, params: SDPAParams) -> SDPAParams:
    options: dict[str, Any] = {"scale": pick.choice((0.1, 0.5, 1.0, 1))}
    if pick.random() < 0.4:
        options |= {"is_causal": params.attn_mask is None, "softcap": pick.choice((0.0, 1.0, 16.0))}
    if pick.random() < 0.3:
        options["window_size"] = pick.choice(((16, -1), (-1, 0), (1, 1), (0, 31)))
    heads = params.query.shape[1]
    if pick.random() < 0.3:
        options["sinks"] = made(pick, (heads,), pick.choice((torch.float32, params.query.dtype)))
    if pick.random() < 0.3:
        options["alibi_slopes"] = made(pick, (heads,), torch.float32)
    return replace(params, **options)


def compiled_for(params: SDPAParams, pick: random.Random, family: Any) -> dict[Any, set[Any]]:
    """Return what Triton looks at of each launch of forward and backward, by what it is kept under."""
    found: dict[Any, set[Any]] = {}

    def note(plan: plans.Plan, given: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors, forms = plan.tensors(given, CPU), plan._forms(given)
        for launch in plan.launches:
            if any(is_descriptor(each) and 0 in each.shape for each in launch.arguments):
                continue
            found.setdefault(launch.compiled_apart(forms, CPU), set()).add(looked_at_by_triton(launch, tensors))
        return tensors

    given = impl.tensors_of(params)
    if params.dropout > 0:
        given["seed"] = torch.zeros(1, dtype=torch.int64)
    forward = impl._of_whole(params, lambda whole: family.forward(whole, HOPPER))
    tensors = note(forward, given)
    out, lse, *saved = (tensors[name] for name in forward.results)
    grad_out = made(pick, tuple(out.shape), out.dtype)
    given |= {"grad_out": grad_out, "out": out, "lse": lse} | dict(zip(("top", "total"), saved, strict=False))
    of_rows = grad_out, None, out, lse, *saved[:2]
    note(impl._of_whole(params, lambda whole: family.backward(whole, HOPPER, *of_rows)), given)
    return found


@pytest.mark.parametrize("family", [launches, choose], ids=["plain", "hopper"])
@pytest.mark.parametrize("kind", [dense, packed])
def test_kernels_that_triton_compiles_apart_are_kept_apart(
    family: Any, kind: Callable[[random.Random], SDPAParams]
) -> None:
    """Of random calls; that what is the same to Triton is mostly found again, `launched` shows."""
    pick, kept = random.Random(0), {}
    for _ in range(200):
        params = kind(pick)
        for apart, looked_at in compiled_for(params, pick, family).items():
            kept.setdefault(apart, set()).update(looked_at)
    assert {len(looked_at) for looked_at in kept.values()} == {1}
    assert len(set.union(*kept.values())) > 50


def test_memory_of_which_triton_tells_kernels_for_amd_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count in 32 bits where a tensor's memory is small enough, and would read elsewhere in a larger one."""
    monkeypatch.setattr(driver.active, "get_current_target", lambda: GPUTarget("hip", "gfx942", 64))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    nowhere, kept = torch.device("meta"), {}
    for queries, keys, step in product((64, 2**24), (64, 2**23 - 1, 2**23, 2**24), (1, 2)):
        query = torch.empty(1, 1, queries, 128, dtype=torch.float16, device=nowhere)
        key, value = torch.empty(2, 1, 1, keys, 128 * step, dtype=torch.float16, device=nowhere)[..., ::step].unbind()
        given = {"query": query, "key": key, "value": value.clone()}
        plan = launches.forward(SDPAParams(**given, scale=0.1), Machine("gfx942", 304))
        tensors, forms = plan.tensors(given, nowhere), plan._forms(given)
        for launch in plan.launches:
            kept.setdefault(launch.compiled_apart(forms, nowhere), set()).add(looked_at_by_triton(launch, tensors))
    assert {len(looked_at) for looked_at in kept.values()} == {1}
    assert len(set.union(*kept.values())) > 4


NUMBERS = (0, 1, True, False, None, 1.0, 0.0, 16, 17, 2**31 - 1, 2**31, 2**40, -(2**31), -(2**31) - 1)


@pytest.mark.parametrize("name", ["num_q", "scale", "sinks"])
def test_numbers_that_triton_compiles_apart_are_kept_apart(name: str) -> None:
    """Where it is told not to specialise them, and where it is not."""
    plan = launches.forward(SDPAParams(*(torch.zeros(1, 1, 16, 64).half() for _ in range(3)), scale=0.1), HOPPER)
    first, kept = plan.launches[0], {}
    place = first.kernel.arg_names.index(name)
    given = {each: torch.zeros(1, 1, 16, 64).half() for each in ("query", "key", "value")}
    tensors, forms = plan.tensors(given, CPU), plan._forms(given)
    for number in NUMBERS:
        arguments = (*first.arguments[:place], number, *first.arguments[place + 1 :])
        launch = first._replace(arguments=arguments)
        looked_at = looked_at_by_triton(launch, tensors)
        kept.setdefault(launch.compiled_apart(forms, CPU), set()).add(looked_at)
    assert {len(looked_at) for looked_at in kept.values()} == {1}


def test_descriptors_that_triton_compiles_apart_are_kept_apart() -> None:
    """By the tile and how it lies in shared memory; shapes and strides of the tensor are numbers to the kernel."""
    given = {each: torch.zeros(1, 1, 256, 64).half() for each in ("query", "key", "value")}
    plan = choose.forward(SDPAParams(**given, is_causal=True, scale=0.1), HOPPER)
    first, kept = plan.launches[0], {}
    place, described = next((place, each) for place, each in enumerate(first.arguments) if is_descriptor(each))
    tensors, forms = plan.tensors(given, CPU), plan._forms(given)
    layouts = [gl.NVMMASharedLayout(swizzle, 16, 4) for swizzle in (32, 64, 128)]
    shapes = [((1, 1, 256, 64), (16384, 16384, 64, 1)), ((1, 2, 128, 64), (32768, 128, 256, 1))]
    for rows, layout, (shape, strides) in product((64, 128), layouts, shapes):
        other = plans.Descriptor(described.name, shape, strides, (1, 1, rows, 64), layout)
        launch = first._replace(arguments=(*first.arguments[:place], other, *first.arguments[place + 1 :]))
        looked_at = looked_at_by_triton(launch, tensors)
        kept.setdefault(launch.compiled_apart(forms, CPU), set()).add(looked_at)
    assert {len(looked_at) for looked_at in kept.values()} == {1}
    assert len(kept) == len(set.union(*kept.values())) == 2 * len(layouts)


def is_descriptor(argument: Any) -> bool:
    return isinstance(argument, plans.Descriptor)
