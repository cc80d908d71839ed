"""PyTorch's operators that another release has changed."""

from __future__ import annotations

import re

import pytest

import forked


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("no_operator", r"has no operator aten::_scaled_dot_product_attention_math"),
        ("Tensor? dropout_mask=None, -> ", r"has another aten::_scaled_dot_product_attention_math"),
        ("float dropout_p=0. -> int dropout_p=0", r"has another aten::_scaled_dot_product_attention_math"),
        ("*, -> *, int tile, ", r"has another aten::_scaled_dot_product_attention_math"),
        ("(Tensor, Tensor) -> Tensor", r"has another aten::_scaled_dot_product_attention_math"),
        ("*, -> int tile=1, *, bool fast=False, ", ""),
    ],
)
def test_an_operator_that_a_release_has_changed_is_named_at_activation(change: str, fault: str) -> None:
    program = f"""
import torch, attnplug
name = "_scaled_dot_product_attention_math"
original = getattr(torch.ops.aten, name).default
schema = str(original._schema)
old, _, new = {change!r}.partition(" -> ")
assert old == "no_operator" or old in schema

class Changed:
    _schema = torch._C.parse_schema(schema.replace(old, new))

    def __call__(self, *args, **kwargs):
        return original(*args, **kwargs)

class Packet:
    default = None if old == "no_operator" else Changed()

setattr(torch.ops.aten, name, Packet())
try:
    attnplug.activate_flash_attention_impl("aten_math")
except attnplug.PluginError as error:
    print(torch.__version__ in str(error), attnplug.current_flash_attention_impl(), error)
query = torch.randn(1, 2, 3, 4)
attnplug.scaled_dot_product_attention(query, query, query)
print("works")
"""
    done = forked.run(program)
    *said, last = done.stdout.splitlines()
    assert last == "works", done.stderr
    assert re.match(rf"True None .*{fault}", said[0]) if fault else not said
