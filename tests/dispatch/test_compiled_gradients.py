"""Gradients inside `torch.compile` are those of the formulas, for each kind of call and each implementation here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zipfile import ZipFile

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
    "packed": PACKED.but(is_causal=True, kv_heads=2),
    "packed, with a window": PACKED.but(window_size=(4, 2)),
}
CASES = [
    pytest.param(impl, call, marks=() if impl in ("torch", "aten_flash") and call in SHORT else pytest.mark.slow)
    for impl in (None, "torch", "aten_flash", "aten_math")
    for call in CALLS
]


@pytest.mark.parametrize(("impl", "name"), CASES)
def test_gradients_of_compiled_calls_are_right(impl: str | None, name: str) -> None:
    call = CALLS[name]
    inputs = call.make()
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, call.params(inputs))):
        pytest.skip("; ".join(verdict.reasons))
    arguments, leaves = call.with_leaves(inputs)
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    constants: dict[str, Any] = {key: value for key, value in arguments.items() if key not in tensors}
    function = attnplug.varlen_attn if call.is_varlen else attnplug.scaled_dot_product_attention

    def attend(tensors: dict[str, Tensor]) -> Any:
        return function(**tensors, **constants, impl=impl)

    torch._dynamo.reset()
    returned = torch.compile(attend, backend="aot_eager", fullgraph=True)(tensors)
    out, lse = returned if call.lse else (returned, None)
    gradients = call.backward(inputs, out, lse, leaves)
    given = {"grad_out": inputs.grad_out} | ({"grad_lse": inputs.grad_lse} if call.lse_gradient else {})
    assert_right(inputs.arguments, out.detach(), None if lse is None else lse.detach(), gradients=gradients, **given)


KERNEL = """
import torch

class Mine:
    def __init__(self, saved):
        self.saved = saved

    def forward(self, params):
        logits = params.query @ params.key.mT * params.scale
        saved = [torch.full((2,), 3.0) for _ in range(self.saved)]
        return logits.softmax(-1) @ params.value, logits.logsumexp(-1), *saved

    def fake(self, params):
        query, saved = params.query, [params.query.new_empty(2) for _ in range(self.saved)]
        return torch.empty_like(query), query.new_empty(query.shape[:-1]), *saved

    def backward(self, params, grad_out, grad_lse, out, lse, *saved):
        assert len(saved) == self.saved
        return grad_out, grad_out, grad_out
"""
PROGRAM = """
import torch, attnplug, kernel
from torch._dynamo.utils import counters

attnplug.register_impl(attnplug.ImplSpec(name="mine", kernel="kernel", backend=None))
attend = torch.compile(lambda query: attnplug.scaled_dot_product_attention(query, query, query, impl="mine"))
query = torch.randn(1, 2, 16, 8, requires_grad=True)
attend(query).sum().backward()
torch.testing.assert_close(query.grad, torch.full_like(query, 3.0))
print("found" if counters["aot_autograd"]["autograd_cache_hit"] else "compiled")
"""
METHODS = "forward", "fake", "backward"


def write_file(folder: Path, saved: int) -> None:
    functions = [f"def {name}(*given): return mine.{name}(*given)" for name in METHODS]
    (folder / "kernel.py").write_text("\n".join((KERNEL, f"mine = Mine({saved})", *functions)))


def write_archive(folder: Path, saved: int) -> None:
    """Of objects that can be called, whose constants are the same."""
    called = "type('Called', (), {'__call__': lambda self, *given: getattr(mine, name)(*given)})()"
    objects = [f"{name} = (lambda name: {called})({name!r})" for name in METHODS]
    with ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("kernel.py", "\n".join((KERNEL, f"mine = Mine({saved})", *objects)))


def write_cell(folder: Path, saved: int) -> None:
    """As in a notebook: code that is in no file, and of which only a number differs."""
    text = KERNEL.replace("range(self.saved)", f"range({saved})").replace("== self.saved", f"== {saved}")
    methods = [f"{name} = Mine(0).{name}" for name in METHODS]
    (folder / "kernel.py").write_text(f"exec(compile({text!r}, '<cell>', 'exec'))\n" + "\n".join(methods))


def write_number(folder: Path, saved: int) -> None:
    """A kernel of the same text that was made with another number, which is in another file."""
    (folder / "number.py").write_text(f"SAVED = {saved}")
    methods = [f"{name} = mine.{name}" for name in METHODS]
    (folder / "kernel.py").write_text("\n".join((KERNEL, "import number", "mine = Mine(number.SAVED)", *methods)))


def write_partials(folder: Path, saved: int) -> None:
    (folder / "number.py").write_text(f"SAVED = {saved}")
    given = [
        "def call(saved, name, *given): return getattr(Mine(saved), name)(*given)",
        "from functools import partial",
    ]
    partials = [f"{name} = partial(call, number.SAVED, {name!r})" for name in METHODS]
    (folder / "kernel.py").write_text("\n".join((KERNEL, "import number", *given, *partials)))


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_file, write_archive, write_cell, write_number, write_partials])
def test_a_graph_on_disk_is_found_again_but_not_for_another_version_of_a_kernel(write: Any, tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (tmp_path, tmp_path / "archive.zip")))
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",  # a version of the same length, written in the same second, would not be seen
    }
    came = []
    for saved in (1, 1, 2):
        write(tmp_path, saved)
        done = forked.run(PROGRAM, environment, tmp_path)
        assert done.returncode == 0, done.stderr
        came += done.stdout.split()
    assert came == ["compiled", "found", "compiled"]
