"""Whether `attnplug.verify` cries wolf: random right calls of every implementation that runs here, each one verified.

    python benchmarks/false_alarms.py [--calls 10000] [--impl NAME ...] [--seed 0]

Each call has random sizes, dtype and features, of those that the implementation takes; every second one runs backward,
too. Prints a line for each implementation, and each alarm as the line of Python that repeats it. The exit status is 1
if there was one. Ctrl-C goes on to the next implementation, and says how many calls were made.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import suppress

import torch

import attnplug
from attnplug.testing import Call

DTYPES = ("float32", "bfloat16", "float16", "float64")
GRADIENTS = ("query", "key", "value")


def random_call(draw: random.Random, device: str) -> Call:
    """Return a small call that asks for something else each time."""
    heads, kv_heads = draw.choice([(1, None), (2, None), (4, 2), (4, 1)])
    lengths = draw.randint(1, 70), draw.randint(1, 70)
    fields: dict[str, object] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": draw.choice([8, 16, 24, 32, 64]),
        "dtype": draw.choice(DTYPES),
        "device": device,
        "is_causal": draw.random() < 0.4,
        "seed": draw.randrange(2**31),
        "values": draw.choice(["normal", "normal", "raised", "rising"]),
    }
    if draw.random() < 0.2:
        count = draw.randint(1, 3)
        fields |= {name: tuple(draw.randint(1, 40) for _ in range(count)) for name in ("lengths_q", "lengths_k")}
    else:
        fields |= {"batch": draw.randint(1, 3), "queries": lengths[0], "keys": draw.choice(lengths)}
        fields["layout"] = draw.choice(["contiguous", "transposed"])
        if draw.random() < 0.2:
            fields |= {"mask": draw.choice(["boolean", "additive", "boolean blind"]), "mask_dims": "b1qk"}
    extra = draw.choice(["", "", "", "softcap", "window", "sinks", "alibi", "lse"])
    fields |= {
        "": {},
        "softcap": {"softcap": 2.0},
        "window": {"window_size": (draw.randint(0, 20), draw.choice([-1, 0, 5]))},
        "sinks": {"sinks": True},
        "alibi": {"alibi": "h"},
        "lse": {"lse": True},
    }[extra]
    if draw.random() < 0.5:
        fields["gradients"] = GRADIENTS
    return Call(**fields)  # type: ignore[arg-type]


def count(impl: str, calls: int, seed: int, device: str) -> attnplug.verify:
    """Verify so many right calls of an implementation."""
    draw = random.Random(seed)
    watched = attnplug.verify(1.0, on_mismatch=lambda mismatch: print(f"  {mismatch}", flush=True))
    with suppress(KeyboardInterrupt), watched:
        for _ in range(20 * calls):
            call = random_call(draw, device)
            inputs = call.make()
            if attnplug.can_use_impl(impl, call.params(inputs)):
                call.run(impl, inputs)
            if watched.results >= calls:
                break
    return watched


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--impl", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.impl or [record.name for record in attnplug.list_impls() if record.status == "available"]
    wrong = 0
    for name in names:
        begun = time.perf_counter()
        watched = count(name, given.calls, given.seed, given.device)
        wrong += watched.wrong
        reasons = "".join(f"; {number} {reason}" for reason, number in watched.skipped.items())
        seconds = time.perf_counter() - begun
        print(
            f"{name}: {watched.results} results and the gradients of {watched.gradients}: {watched.wrong} alarms"
            f"{reasons} ({seconds:.0f} s)",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
