"""The most memory that `math_ref` takes beyond its inputs and results: the resident set of a fresh interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import harness
from harness import Result, alternate_scripts

SCRIPT = """
import torch, attnplug
torch.set_num_threads(1)
length, backward = {length}, {backward}

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def attend(length):
    query, key, value = (torch.randn(1, 8, length, 64).requires_grad_(backward) for _ in range(3))
    grad = torch.randn(1, 8, length, 64)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    out = attnplug.scaled_dot_product_attention(query, key, value, impl="math_ref")
    results = [out]
    if backward:
        out.backward(grad)
        results += [query.grad, key.grad, value.grad]
    return status("VmHWM") - before - sum(tensor.nbytes for tensor in results)

attend(64)  # code that is loaded once is no memory of a call
print(attend(length) / 2**20)
"""


def measure(quick: bool) -> Iterator[Result]:
    length = 512 if quick else 8192
    for name, backward, limits in (("forward", False, (256, 64)), ("forward and backward", True, ())):
        script = SCRIPT.format(length=length, backward=backward)
        (peak,) = alternate_scripts({"": [sys.executable, "-c", script]}, 1).seconds[""]
        yield Result(f"math_ref {name}, B1 H8 S{length} E64 float32: peak beyond in and out", peak, "MiB", *limits)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
