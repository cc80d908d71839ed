"""Whether `attnplug.verify` cries wolf: random right calls of every implementation that runs here, each one verified.

    python benchmarks/false_alarms.py [--calls 10000] [--impl NAME ...] [--kinds N] [--seed 0]

Each call has random sizes, dtype and features, of those that the implementation takes; every second one runs backward,
too. With `--kinds`, all but lengths, batch and numbers repeat: `flex` compiles a kernel for each kind. Prints
a line for each implementation, and each alarm as the line of Python that repeats it. The exit status is 1 if there was
one. Ctrl-C goes on to the next implementation, and says how many calls were made.
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


def random_kind(draw: random.Random, device: str) -> dict[str, object]:
    """Return what a kernel may be compiled for: all of a call but sizes and numbers."""
    heads, kv_heads = draw.choice([(1, None), (2, None), (4, 2), (4, 1)])
    kind: dict[str, object] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": draw.choice([8, 16, 24, 32, 64]),
        "dtype": draw.choice(DTYPES),
        "device": device,
        "is_causal": draw.random() < 0.4,
    }
    if draw.random() < 0.2:
        kind["lengths_q"] = ()
    else:
        kind["layout"] = draw.choice(["contiguous", "transposed"])
        if draw.random() < 0.2:
            kind |= {"mask": draw.choice(["boolean", "additive", "boolean blind"]), "mask_dims": "b1qk"}
    extra = draw.choice(["", "", "", "softcap", "window", "sinks", "alibi", "lse"])
    kind |= {
        "": {},
        "softcap": {"softcap": 2.0},
        "window": {"window_size": (0, 0)},
        "sinks": {"sinks": True},
        "alibi": {"alibi": "h"},
        "lse": {"lse": True},
    }[extra]
    if draw.random() < 0.5:
        kind["gradients"] = GRADIENTS
    return kind


def random_call(draw: random.Random, kind: dict[str, object]) -> Call:
    """Return a small call of a kind."""
    fields = kind | {
        "seed": draw.randrange(2**31),
        "values": draw.choice(["normal", "normal", "raised", "rising"]),
    }
    if "lengths_q" in kind:
        count = draw.randint(1, 3)
        fields |= {name: tuple(draw.randint(1, 40) for _ in range(count)) for name in ("lengths_q", "lengths_k")}
    else:
        lengths = draw.randint(1, 70), draw.randint(1, 70)
        fields |= {"batch": draw.randint(1, 3), "queries": lengths[0], "keys": draw.choice(lengths)}
    if "window_size" in kind:
        fields["window_size"] = (draw.randint(0, 20), draw.choice([-1, 0, 5]))
    return Call(**fields)


def count(impl: str, calls: int, kinds: int, seed: int, device: str) -> attnplug.verify:
    """Verify so many right calls of an implementation, of so many kinds; 0 is any."""
    draw = random.Random(seed)
    repeated = [random_kind(draw, device) for _ in range(kinds)]
    watched = attnplug.verify(1.0, on_mismatch=lambda mismatch: print(f"  {mismatch}", flush=True))
    with suppress(KeyboardInterrupt), watched:
        for _ in range(20 * calls):
            call = random_call(draw, draw.choice(repeated) if repeated else random_kind(draw, device))
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
    parser.add_argument("--kinds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.impl or [record.name for record in attnplug.list_impls() if record.status == "available"]
    wrong = 0
    for name in names:
        begun = time.perf_counter()
        watched = count(name, given.calls, given.kinds, given.seed, given.device)
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
