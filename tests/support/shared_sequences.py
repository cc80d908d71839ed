"""What the ranks of a world do in tests of `attnplug.parallel`: a call on parts, held against the call on one rank.

With dropout, what is right depends on what was dropped, which `assert_right` does not take: there the private rule
behind it is asked.
"""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode

import attnplug
from attnplug import parallel
from attnplug._accuracy import Expected, Outcome
from attnplug.testing import assert_right
from shared_kernels import Opaque, register

TENSORS = ("query", "key", "value")
_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*sizes: int) -> DeviceMesh:
    """Return the device mesh of all ranks with these dimensions; made once, as each makes groups."""
    if sizes not in _meshes:
        _meshes[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "heads")[: len(sizes)])
    return _meshes[sizes]


def dense(
    method: str = "ring",
    length: int = 48,
    keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    mesh: tuple[int, int] | None = None,
    lse_gradient: bool = False,
    sinks: bool = False,
    run: Callable[..., Any] | None = None,
    **arguments: Any,
) -> None:
    """Run one call on every rank's part, forward and backward, and hold all of it against the contract's rule.

    Args:
        method: `ring`, `ulysses` or `usp`.
        length, keys: of the whole sequences of queries and keys.
        heads, sizes: of queries and keys, and of values.
        dtype: of query, key and value.
        mesh: for `usp`.
        lse_gradient: whether lse is part of the loss.
        sinks: whether there are some.
        run: what to call instead of the function itself, such as the compiled one.
        arguments: others of the call.
    """
    group: Any = dist.group.WORLD if mesh is None else mesh_of(*mesh)
    impl = arguments.pop("impl", None)
    given = _given(length, length if keys is None else keys, heads, sizes, dtype, sinks)
    folded = arguments.get("is_causal", False) and method != "ulysses"
    local = {name: cut(given[name], group, folded).requires_grad_() for name in TENSORS}
    more: dict[str, Any] = dict(arguments)
    if sinks:
        more["sinks"] = given["sinks"].clone().requires_grad_()
    for name, tensor in more.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and name != "sinks":
            more[name] = tensor.detach().clone().requires_grad_()
    where = {"mesh": group} if method == "usp" else {"group": group}
    call = run or getattr(parallel, f"{method}_attention")
    long = given["key"].shape[2]
    out, lse = call(
        *local.values(), **where, **more, enable_gqa=heads[0] != heads[1], length=long, return_lse=True, impl=impl
    )
    outputs, grads = [out], [cut(given["grad_out"], group, folded)]
    if lse_gradient:
        outputs, grads = [*outputs, lse], [*grads, cut(given["grad_lse"], group, folded, dim=-1)]
    torch.autograd.backward(outputs, grads)
    found = {name: joined(tensor.grad, group, folded, given[name].shape[2]) for name, tensor in local.items()}
    for name in ("sinks", "attn_mask"):
        if (tensor := more.get(name)) is not None and tensor.requires_grad:
            dist.all_reduce(tensor.grad)
            found[name] = tensor.grad
    whole = {name: value.detach() if isinstance(value, Tensor) else value for name, value in more.items()}
    assert_right(
        {**{name: given[name] for name in TENSORS}, **whole, "enable_gqa": heads[0] != heads[1]},
        joined(out.detach(), group, folded, length),
        joined(lse.detach(), group, folded, length, dim=-1),
        found,
        grad_out=given["grad_out"],
        grad_lse=given["grad_lse"] if lse_gradient else None,
    )


def packed(
    lengths: list[int],
    impl: str,
    heads: tuple[int, int] = (4, 2),
    run: Callable[..., Any] = parallel.ring_varlen_attn,
    **arguments: Any,
) -> None:
    """The same for packed sequences."""
    group = dist.group.WORLD
    torch.manual_seed(1)
    tokens = sum(lengths)
    given = {name: torch.randn(tokens, heads[name != "query"], 16) for name in TENSORS}
    grad_out = torch.randn(tokens, heads[0], 16)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    folded = arguments.get("is_causal", False)
    local = {name: cut(tensor, group, folded, dim=0).requires_grad_() for name, tensor in given.items()}
    out, lse = run(*local.values(), starts, group=group, enable_gqa=True, return_lse=True, impl=impl, **arguments)
    out.backward(cut(grad_out, group, folded, dim=0))
    found = {name: joined(tensor.grad, group, folded, tokens, dim=0) for name, tensor in local.items()}
    whole = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": max(lengths), "max_k": max(lengths), "enable_gqa": True}
    assert_right(
        {**given, **whole, **arguments},
        joined(out.detach(), group, folded, tokens, dim=0),
        joined(lse.detach(), group, folded, tokens, dim=-1),
        found,
        grad_out=grad_out,
    )


class NothingFromTheHost(TorchFunctionMode):
    """Refuses a number that is assigned to one element, for which PyTorch waits, as it may not during a capture."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__:
            assert args[0][args[1]].dim() > 0, "a number is copied from the host"
        return func(*args, **(kwargs or {}))


def packed_while_a_graph_is_captured() -> int:
    """The same where a CUDA graph is captured; return how many more tensors of integers the process keeps then."""
    before = _integers()
    with (
        patch("torch.cuda.is_initialized", lambda: True),
        patch("torch.cuda.is_current_stream_capturing", lambda: True),
        NothingFromTheHost(),
    ):
        packed([19, 31, 7], "math_ref")  # lengths that nothing may be kept of yet, so those of this test alone
    known = set(map(id, before))
    return sum(id(each) not in known for each in _integers())


def _integers() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Tensor and each.dtype is torch.int32]


def dropped(method: str, impl: str, is_causal: bool, length: int = 24) -> list[float]:
    """Run a call with dropout whose values are the identity, so that out shows what was dropped; check its gradients.

    Returns the shares of dropped pairs, whether two ranks dropped the same, and whether two calls did.
    """
    group, probability = dist.group.WORLD, 0.4
    torch.manual_seed(0)  # the same on each rank, on purpose
    given = _given(length, length, (4, 4), (16, length), torch.float64, False)
    given["value"] = torch.eye(length, dtype=torch.float64).expand(2, 4, length, length).contiguous()
    folded = is_causal and method == "ring"
    local = {name: cut(given[name], group, folded).requires_grad_() for name in TENSORS}
    call = getattr(parallel, f"{method}_attention")

    def run() -> Tensor:
        return call(*local.values(), group=group, is_causal=is_causal, dropout_p=probability, length=length, impl=impl)

    out = run()
    out.backward(cut(given["grad_out"], group, folded))
    whole = joined(out.detach(), group, folded, length)
    factors = (whole != 0).double() / (1 - probability)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    found = {name: joined(tensor.grad, group, folded, length) for name, tensor in local.items()}
    arguments = {**{name: given[name] for name in TENSORS}, "is_causal": is_causal, "dropout_p": probability}
    expected = Expected(arguments, TENSORS, given["grad_out"], None, factors)
    mistakes = expected.mistakes(Outcome(whole, None, found))
    assert not mistakes, mistakes
    again = joined(run().detach(), group, folded, length)
    share = 1 - (factors != 0)[..., seen].double().mean().item()
    halves = (factors[:, :2] != 0)[..., seen], (factors[:, 2:] != 0)[..., seen]
    rows = (factors[:, :, : length // 2, : length // 4] != 0), (factors[:, :, length // 2 :, : length // 4] != 0)
    return [
        share,
        float(torch.equal(*halves)) + float(torch.equal(*(part[:, :, -(length // 4) :] for part in rows))),
        float(torch.equal(again != 0, whole != 0)),
    ]


def dropped_from_dtensors() -> tuple[bool, bool]:
    """Drop from a call of DTensors; return whether two shares of equal numbers lost the same, and two replicas."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)  # the same on each rank, as PyTorch asks for replicas
    same, found = [], torch.eye(16).expand(2, 1, 16, 16)
    for placement in (Shard(0), Replicate()):
        query = distribute_tensor(found, mesh_of(2), [placement])
        out = attnplug.scaled_dot_product_attention(query, query, query, dropout_p=0.5, impl="math_ref").to_local()
        parts = [torch.empty_like(out) for _ in range(2)]
        dist.all_gather(parts, out.contiguous())
        same.append(torch.equal(*parts))
    return same[0], same[1]


def _given(
    length: int, keys: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, sinks: bool
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "query": (2, heads[0], length, sizes[0]),
        "key": (2, heads[1], keys, sizes[0]),
        "value": (2, heads[1], keys, sizes[1]),
        "grad_out": (2, heads[0], length, sizes[1]),
    }
    given = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    given["grad_lse"] = torch.randn(2, heads[0], length)
    given["sinks"] = torch.randn(heads[0])
    return given


def cut(tensor: Tensor, group: Any, folded: bool, dim: int = -2) -> Tensor:
    return parallel.shard_sequence(tensor, group=group, dim=dim, is_causal=folded).detach()


def joined(tensor: Any, group: Any, folded: bool, length: int, dim: int = -2) -> Tensor:
    return parallel.unshard_sequence(tensor, group=group, dim=dim, is_causal=folded, length=length)


def compiled(method: str) -> None:
    """Run compiled calls, in one graph each."""
    call = torch.compile(getattr(parallel, f"{method}_attention"), fullgraph=True, backend="aot_eager")
    mesh = (2, 2) if method == "usp" else None
    for impl in ("math_ref", "aten_flash", "opaque"):
        dense(method, run=call, impl=impl, is_causal=True, mesh=mesh, heads=(4, 4))
    if method == "ring":
        packed_call = torch.compile(parallel.ring_varlen_attn, fullgraph=True, backend="aot_eager")
        packed([13, 20, 2, 30], "math_ref", run=packed_call, is_causal=True)


def recorded() -> list[str]:
    with attnplug.sdpa_kernel("aten_flash"), attnplug.record() as calls:
        dense(is_causal=True)
    return [call.impl for call in calls]


def recorded_under_a_flag() -> list[str]:
    """Return what runs without the flag of deterministic algorithms, with it, and without it again."""
    register("indeterministic")
    with attnplug.sdpa_kernel(["indeterministic", "aten_flash"], set_priority=True), attnplug.record() as calls:
        for flag in (False, True, False):
            torch.use_deterministic_algorithms(flag)
            dense(is_causal=True)
    return [call.impl for call in calls]


def under_autocast() -> None:
    query = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = parallel.ring_attention(query, query, query, group=dist.group.WORLD, is_causal=True, impl="aten_flash")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


def beside_another_default_device() -> None:
    query = torch.randn(1, 2, 8, 24, requires_grad=True)  # of a size that no other call has: its kernel is tried first
    with torch.device("meta"):
        for method, dropout_p in ((parallel.ring_attention, 0.0), (parallel.ulysses_attention, 0.5)):
            out = method(query, query, query, group=dist.group.WORLD, dropout_p=dropout_p, impl="math_ref")
            (gradient,) = torch.autograd.grad(out.sum(), query)
            assert out.isfinite().all()
            assert gradient.isfinite().all()


def checkpointed() -> None:
    from torch.utils.checkpoint import checkpoint

    query = torch.randn(1, 2, 8, 8, requires_grad=True)

    def attend(query: Tensor, impl: str | None = None) -> Tensor:
        return parallel.ring_attention(query, query, query, group=dist.group.WORLD, is_causal=True, impl=impl)

    with attnplug.sdpa_kernel("aten_flash"), attnplug.record() as calls:
        out = checkpoint(attend, query, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    with attnplug.record() as again:
        (grad,) = torch.autograd.grad(out.sum(), query)
    assert [call.impl for call in (*calls, *again)] == ["aten_flash", "aten_flash"]
    (expected,) = torch.autograd.grad(attend(query, "aten_flash").sum(), query)
    torch.testing.assert_close(grad, expected)


def sharded() -> None:
    """Run a ring on DTensors that are sharded along another dimension of the mesh."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = mesh_of(2, 2)
    ring, others = mesh["ring"], mesh["heads"]
    given = _given(16, 16, (4, 4), (8, 8), torch.float32, False)
    whole = given["query"].clone().requires_grad_()
    expected = attnplug.scaled_dot_product_attention(whole, whole, whole, is_causal=True)
    expected.backward(given["grad_out"])
    for impl in ("math_ref", "opaque"):
        for dim in (0, 1):
            query, grad_out = (
                distribute_tensor(cut(given[name], ring, True), others, [Shard(dim)]) for name in ("query", "grad_out")
            )
            query.requires_grad_()
            out = parallel.ring_attention(query, query, query, group=ring, is_causal=True, impl=impl)
            assert isinstance(out, DTensor)
            out.backward(grad_out)
            torch.testing.assert_close(joined(out.full_tensor().detach(), ring, True, 16), expected.detach())
            grad = joined(query.grad.full_tensor(), ring, True, 16)
            torch.testing.assert_close(grad, whole.grad, rtol=1e-4, atol=1e-5)


def mistaken(what: str) -> None:
    """Make one mistake."""
    group, query = dist.group.WORLD, torch.randn(1, 2, 8, 8)
    if what == "short":
        parallel.shard_sequence(query[:, :, :3], group=group)
    elif what == "length":
        parallel.ring_attention(query, query, query, group=group, length=24)
    elif what == "unequal":
        parallel.ring_attention(query[:, :, :6], query, query, group=group, is_causal=True)
    elif what == "group":
        parallel.ring_attention(query, query, query, group="all")
    elif what == "not a member":
        others = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        parallel.ring_attention(query, query, query, group=others[1 - dist.get_rank()])
    elif what == "mesh":
        parallel.usp_attention(query, query, query, mesh="all")
    elif what == "impl":
        parallel.ring_attention(query, query, query, group=group, impl=["aten_flash"])
    elif what == "mask":
        parallel.ulysses_attention(query, query, query, group=group, attn_mask=torch.ones(8, 8, dtype=torch.bool))
    elif what == "scale":
        starts, scale = torch.tensor([0, 16], dtype=torch.int32), torch.tensor(0.5)
        given = (torch.randn(8, 2, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8), starts)
        same = [parallel.ring_varlen_attn(*given, group=group, scale=each) for each in (0.5, scale)]
        assert torch.equal(*same)
        parallel.ring_varlen_attn(*given, group=group, scale="half")
    elif what == "starts":
        starts = torch.tensor([0, 9, 5], dtype=torch.int32)
        parallel.ring_varlen_attn(query[0], query[0], query[0], starts, group=group)
    else:
        parallel.context_parallel(torch.nn.Linear(2, 2), group, "rings")


def unlike(method: str, name: str, value: Any) -> None:
    """Let the last rank call with another value of one argument, or with other tensors."""
    given: dict[str, Any] = {"batch": 1, "heads": 6, "dtype": "float32", "is_causal": False, "window_size": (-1, -1)}
    if dist.get_rank() == dist.get_world_size() - 1:
        given[name] = value
    batch, heads, kind = (given.pop(each) for each in ("batch", "heads", "dtype"))
    part = torch.randn(batch, heads, 8, 16, dtype=getattr(torch, kind))
    if given.pop("packed", False):
        rows = part[0].transpose(0, 1)
        parallel.ring_varlen_attn(rows, rows, rows, torch.tensor([0, 24], dtype=torch.int32), group=dist.group.WORLD)
        return
    attend = parallel.ring_attention if method == "ring" else parallel.ulysses_attention
    attend(part, part, part, group=dist.group.WORLD, **given)


def first_calls_in_a_group() -> tuple[int, int]:
    """Make a group, call in it, and return how many keys the store has before and after."""
    group = dist.new_group([*range(dist.get_world_size())])
    part = torch.randn(1, 4, 8, 16)
    dist.all_reduce(torch.zeros(1), group=group)  # which connects
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    before = store.num_keys()
    dist.barrier()
    for attend in (parallel.ring_attention, parallel.ulysses_attention):
        attend(part, part, part, group=group)
    dist.barrier()
    return before, store.num_keys()


def is_held_when_destroyed(method: str) -> bool:
    """Make a group, call in it, forward and backward, destroy it, and return whether somebody still has it."""
    group = dist.new_group([*range(dist.get_world_size())])
    part = torch.randn(1, 4, 8, 16, requires_grad=True)
    getattr(parallel, f"{method}_attention")(part, part, part, group=group).sum().backward()
    held = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return held() is not None


def failing(method: str, rank: int, how: str, when: str) -> None:
    """Let one rank raise, be killed, or stop, in the kernel of the second call, forward or backward."""
    dense(method, impl="opaque", is_causal=True, heads=(6, 3))
    if dist.get_rank() == rank:
        Opaque.faults[when] = {"raises": _raise, "is killed": _kill, "stops": _stop}[how]
    dense(method, impl="opaque", is_causal=True, heads=(6, 3))


def _raise() -> None:
    raise OSError("this rank is broken")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
