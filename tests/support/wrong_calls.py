"""Calls that PyTorch's CUDA kernels get wrong, or refuse."""

from attnplug.testing import Call

PLAIN = Call(batch=2, heads=2, queries=16, keys=24, head_size=16)
BAD = {
    "misaligned": PLAIN.but(layout="misaligned"),
    "rows between": PLAIN.but(layout="framed"),
    "strided": PLAIN.but(layout="strided"),
    "a misaligned mask": PLAIN.but(mask="additive", mask_layout="misaligned"),
    "misaligned with a mask": PLAIN.but(layout="misaligned", mask="additive"),
    "a mask with one column": PLAIN.but(mask="additive", mask_dims="bhq1"),
    "a boolean mask with one column": PLAIN.but(mask="boolean", mask_dims="bhq1"),
    "a strided mask": PLAIN.but(mask="additive", mask_layout="strided"),
    "a column-major mask": PLAIN.but(mask="additive", mask_layout="column-major"),
    "a mask of one dimension": PLAIN.but(mask="additive", mask_dims="k"),
    "a negative scale under a causal mask": PLAIN.but(is_causal=True, scale=-0.3),
    "a scale of zero under a causal mask": PLAIN.but(is_causal=True, scale=0.0),
}
