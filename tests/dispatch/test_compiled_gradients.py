"""Gradients inside `torch.compile` are those of the formulas, for each kind of call and each implementation here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
import forked
from attnplug.testing import Call, assert_right

QKV = ("query", "key", "value")
PLAIN = Call(queries=20, keys=24, heads=4, head_size=16, gradients=QKV)
SQUARE = PLAIN.but(queries=24)
MASKED = PLAIN.but(mask="additive", gradients=(*QKV, "attn_mask"))
PACKED = Call(
    heads=4, head_size=16, lengths_q=(5, 13, 1), lengths_k=(9, 13, 7), causal_variant="LOWER_RIGHT", gradients=QKV
)
SHORT = {
    "a mask that wants a gradient and broadcasts": MASKED.but(mask_dims="b1q1"),
    "a negative scale under a causal mask": SQUARE.but(is_causal=True, scale=-0.3),
}
PACKED_CALLS = {
    "packed": PACKED.but(is_causal=True, kv_heads=2),
    "packed, with a window": PACKED.but(window_size=(4, 2)),
}
CALLS = SHORT | {
    "plain": PLAIN,
    "causal": SQUARE.but(is_causal=True),
    "causal, lower right": PLAIN.but(is_causal=True, causal_variant="LOWER_RIGHT"),
    "grouped queries": PLAIN.but(kv_heads=2),
    "a scale": PLAIN.but(scale=0.3),
    "a boolean mask": PLAIN.but(mask="boolean", mask_dims="11qk"),
    "a boolean mask with blind rows": PLAIN.but(mask="boolean blind", mask_dims="b1qk"),
    "a mask that wants a gradient": MASKED,
    "a mask of one dimension": PLAIN.but(mask="additive", mask_dims="k"),
    "misaligned": PLAIN.but(layout="misaligned"),
    "a window": PLAIN.but(window_size=(5, 3)),
    "softcap": MASKED.but(softcap=1.5),
    "sinks": PLAIN.but(sinks=True, gradients=(*QKV, "sinks")),
    "ALiBi": SQUARE.but(alibi="h", is_causal=True),
    "lse": PLAIN.but(lse=True),
    "a gradient through lse": PLAIN.but(lse=True, lse_gradient=True, sinks=True, gradients=(*QKV, "sinks")),
    **PACKED_CALLS,
}
DECLINED = ("causal, lower right", "a window", "softcap", "sinks", "ALiBi", "a gradient through lse", *PACKED_CALLS)
"""What PyTorch's implementations do not take."""
CHOSEN = (*SHORT, "grouped queries", "a boolean mask with blind rows", *DECLINED)
"""What is tried without a name, too. After the choice nothing in a trace depends on who made it."""
CASES = [
    pytest.param(impl, call, marks=() if impl in ("torch", "aten_flash") and call in SHORT else pytest.mark.slow)
    for impl in (None, "torch", "aten_flash", "aten_math")
    for call in (CHOSEN if impl is None else [call for call in CALLS if call not in DECLINED])
]


@pytest.mark.parametrize(("impl", "name"), CASES)
def test_gradients_of_compiled_calls_are_right(impl: str | None, name: str) -> None:
    call = CALLS[name]
    inputs = call.make()
    taken = [each for each in ("torch", "aten_flash", "aten_math") if attnplug.can_use_impl(each, call.params(inputs))]
    assert bool(taken) is (name not in DECLINED)
    if impl is not None and impl not in taken:
        pytest.skip("; ".join(attnplug.can_use_impl(impl, call.params(inputs)).reasons))
    arguments, leaves = call.with_leaves(inputs)
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    constants: dict[str, Any] = {key: value for key, value in arguments.items() if key not in tensors}
    function = attnplug.varlen_attn if call.is_varlen else attnplug.scaled_dot_product_attention

    def attend(tensors: dict[str, Tensor]) -> Any:
        return function(**tensors, **constants, impl=impl)

    returned = torch.compile(attend, backend="aot_eager", fullgraph=True)(tensors)
    out, lse = returned if call.lse else (returned, None)
    gradients = call.backward(inputs, out, lse, leaves)
    given = {"grad_out": inputs.grad_out} | ({"grad_lse": inputs.grad_lse} if call.lse_gradient else {})
    assert_right(inputs.arguments, out.detach(), None if lse is None else lse.detach(), gradients=gradients, **given)


KERNEL = """
import torch

SAVED = {saved}

def forward(params):
    logits = params.query @ params.key.mT * params.scale
    return logits.softmax(-1) @ params.value, logits.logsumexp(-1), *[torch.full((2,), 3.0) for _ in range(SAVED)]

def fake(params):
    query = params.query
    return torch.empty_like(query), query.new_empty(query.shape[:-1]), *[query.new_empty(2) for _ in range(SAVED)]

def backward(params, grad_out, grad_lse, out, lse, *saved):
    assert len(saved) == SAVED
    return grad_out, grad_out, grad_out
"""
PROGRAM = """
import torch, attnplug, kernel
from torch._dynamo.utils import counters

attnplug.register_impl(attnplug.ImplSpec(name="mine", kernel="kernel", backend=None))
attend = torch.compile(lambda *tensors: attnplug.scaled_dot_product_attention(*tensors, impl="mine"))
tensors = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]  # one alone has a sum to compile in C++
attend(*tensors).sum().backward()
for tensor in tensors:
    torch.testing.assert_close(tensor.grad, torch.ones_like(tensor))
print("found" if counters["aot_autograd"]["autograd_cache_hit"] else "compiled")
"""


@pytest.mark.slow
def test_a_graph_on_disk_is_found_again_but_not_for_another_version_of_a_kernel(tmp_path: Path) -> None:
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",  # a version of the same length, written in the same second, would not be seen
    }
    came = []
    for saved in (1, 1, 2):
        (tmp_path / "kernel.py").write_text(KERNEL.format(saved=saved))
        done = forked.run(PROGRAM, environment, tmp_path, warm="dynamo")
        assert done.returncode == 0, done.stderr
        came += done.stdout.split()
    assert came == ["compiled", "found", "compiled"]
