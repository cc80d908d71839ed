"""Candidates for Hopper's forward kernel against what is shipped; see `attnplug_flash_triton.hopper.candidates`.

A candidate that is not right is not timed. The others, what is shipped and the peers take turns. A ratio is a time of
the candidate over that of what is shipped; below 1 it is faster. What should become the default is said at the end.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import harness
import peers
from attnplug import CausalVariant, SDPAParams
from attnplug.testing import assert_right
from attnplug_flash_triton import cost, impl
from attnplug_flash_triton.hopper import outputs
from attnplug_flash_triton.hopper.candidates import CANDIDATES, Candidate
from attnplug_flash_triton.plans import Plan
from attnplug_flash_triton.problem import Machine, read
from harness import Result, alternate

CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": (1024, 0)},
    "short": {},
    "short causal": {"is_causal": True},
    "softcap": {"softcap": 30.0},
    "causal softcap": {"softcap": 30.0, "is_causal": True},
    "variable length": {"is_causal": True},
}
LENGTH, SHORT = 8192, 1024
FILLED = 384
"""A length that fills the tiles of two warpgroups, and of three."""
IN_SHORT = ("short", "variable length")
"""What calls of short sequences begin with."""
LENGTHS, LONG = (5, 70, 1023, 1300), 2048
"""Of calls that are held against the formulas, and of those that must be exact and repeat."""
REPEATS = 10
BURST = 5
"""Calls without a wait between them, so that the host's time does not show in short ones."""
GAIN, LOSS = 0.99, 1.01
"""A candidate wins if its mean ratio is below the first, and none of its ratios above the second."""
HOPPER = Machine("sm_90", 132)


def measure(quick: bool) -> Iterator[Result]:
    peers.needed(quick, "benchmarks/candidates.py")
    compile_all()
    ratios: dict[tuple[int, str], dict[str, list[float]]] = {}
    groups = sorted({(candidate.size, call) for candidate in CANDIDATES for call in candidate.expected}, key=str)
    for size, call in groups:
        rivals = [candidate for candidate in CANDIDATES if candidate.size == size and call in candidate.expected]
        good = []
        for rival in rivals:
            wrong = fault(rival, call) if peers.HAS_GPU else ""
            if wrong:
                yield Result(f"{rival.name}, head size {size}, {call}: WRONG, {wrong}", float("inf"), "ratio", 1.0)
            else:
                good.append(rival)
        for rival, result in timed(good, size, call, 3 if quick else 21):
            ratios.setdefault((size, kind(call)), {}).setdefault(rival.name, []).append(result.value)
            yield result
    for (size, of), found in ratios.items():
        print(conclusion(size, of, found), flush=True)


def kind(call: str) -> str:
    """Return which tiles a call runs on."""
    softcap = ", softcap" if "softcap" in CALLS[call] else ""
    return (outputs.BOUNDED if CALLS[call].get("is_causal") else outputs.FULL) + softcap


def conclusion(size: int, of: str, ratios: Mapping[str, list[float]]) -> str:
    """Say which candidate should take the place of what is shipped."""
    means = {name: statistics.geometric_mean(found) for name, found in ratios.items() if max(found) <= LOSS}
    best = min(means, key=means.__getitem__, default="")
    if not best or means[best] > GAIN:
        return f"TILES[{size}, {of}] stays"
    change = next(each.change for each in CANDIDATES if (each.name, each.size) == (best, size))
    return f"TILES[{size}, {of}] should become {best}, {dict(change)}: {means[best]:.3f} of the time"


def compile_all() -> None:
    """Compile all kernels at once, in processes of their own, to where Triton finds them."""
    jobs = {(each.size, call, number) for number, each in enumerate(CANDIDATES) for call in each.expected}
    if peers.HAS_GPU:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
            list(processes.map(compile_one, *zip(*jobs, strict=True)))


def compile_one(size: int, call: str, number: int) -> None:
    """Compile a candidate, and what is shipped beside it."""
    length = SHORT if call.startswith(IN_SHORT) else FILLED
    params = params_of(call_of(size, length, call, "cpu", heads=(4, 2)))
    for candidate in (CANDIDATES[number], None):
        plan = plan_of(params, size, candidate)
        for launch in plan.launches:
            cost.compiled(launch, plan.tensors(impl.tensors_of(params), torch.device("cpu")), "sm_90")


def call_of(size: int, length: int, call: str, device: str, heads: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments of a call of 16k tokens or, where that is not all heads, of 2 sequences."""
    sequences = peers.TOKENS // length if heads[0] * size == peers.COLUMNS else 2
    options = dict(CALLS[call])
    shapes = [(sequences, head, length, size) for head in (heads[0], heads[1], heads[1])]
    if call == "variable length":
        shapes = [(sequences * length, head, size) for _, head, _, _ in shapes]
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
        starts[1:-1] -= length // 3  # of unequal length
        longest = int(starts.diff().max())
        options |= dict(cu_seq_q=starts, cu_seq_k=starts, max_q=longest, max_k=longest)
    tensors = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    return {**dict(zip(("query", "key", "value"), tensors, strict=True)), "enable_gqa": True, **options}


def params_of(arguments: Mapping[str, Any]) -> SDPAParams:
    """Return arguments as an implementation gets them."""
    variant = CausalVariant.LOWER_RIGHT if "cu_seq_q" in arguments else CausalVariant.UPPER_LEFT
    return SDPAParams(**arguments, scale=arguments["query"].shape[-1] ** -0.5, causal_variant=variant)


def plan_of(params: SDPAParams, size: int, candidate: Candidate | None) -> Plan:
    """Return the plan of a call with a candidate, or as it is shipped."""
    machine = HOPPER if params.query.device.type == "cpu" else impl.machine_of(params.query.device)
    if candidate is None:
        return outputs.forward(params, machine)
    problem = read(params, machine)
    return outputs.plan(problem, size, outputs.tiles_of(problem, size)._replace(**candidate.change))


def results(plan: Plan, params: SDPAParams) -> tuple[Tensor, ...]:
    """Run a plan with NaN where it must write."""
    tensors = plan.tensors(impl.tensors_of(params), params.query.device)
    for name in plan.results:
        if plan.new[name].fill is None:
            tensors[name].fill_(torch.nan)
    for launch in plan.launches:
        launch.run(tensors)
    return tuple(tensors[name] for name in plan.results)


def fault(candidate: Candidate, call: str) -> str:
    """Return what is wrong about a candidate; empty if nothing is."""
    size = candidate.size
    for length in LENGTHS:
        arguments = call_of(size, length, call, peers.DEVICE, heads=(4, 2))
        params = params_of(arguments)
        out, lse = results(plan_of(params, size, candidate), params)
        try:
            assert_right(arguments, out, lse)
        except AssertionError as error:
            return f"length {length}: {str(error).splitlines()[0]}"
    if call != "variable length" and not is_exact(candidate, call):
        return "small integers are not exact"
    params = params_of(call_of(size, LONG, call, peers.DEVICE, heads=(8, 8)))
    plan = plan_of(params, size, candidate)
    first = results(plan, params)
    for _ in range(REPEATS):
        if not all(torch.equal(one, other) for one, other in zip(first, results(plan, params), strict=True)):
            return "repeated runs differ"
    return ""


def is_exact(candidate: Candidate, call: str) -> bool:
    """Whether means of small integers, where logits are 0, are exact in rows that see a power of two of keys."""
    params = params_of(call_of(candidate.size, LONG, call, peers.DEVICE, heads=(4, 2)))
    params.query.zero_()
    params.value.copy_(torch.randint(-1, 2, params.value.shape, device=peers.DEVICE))
    out, _ = results(plan_of(params, candidate.size, candidate), params)
    row = torch.arange(LONG, device=peers.DEVICE)
    distance = row[:, None] - row
    seen = (distance >= 0) | (not params.is_causal)
    if params.window_size[0] >= 0:
        seen &= distance <= params.window_size[0]
    count = seen.sum(1)
    value = params.value.double().repeat_interleave(2, 1)
    mean = (seen.double() @ value / count[:, None]).to(out.dtype)
    rows = (count & (count - 1)) == 0
    return torch.equal(out[:, :, rows], mean[:, :, rows])


def timed(rivals: list[Candidate], size: int, call: str, turns: int) -> Iterator[tuple[Candidate, Result]]:
    """Let the candidates of one kind of call, what is shipped, and the peers take turns."""
    length = (SHORT if call.startswith(IN_SHORT) else LENGTH) if peers.HAS_GPU else 32
    heads = peers.COLUMNS // size if peers.HAS_GPU else 2
    params = params_of(call_of(size, length, call, peers.DEVICE, heads=(heads, heads)))
    given = impl.tensors_of(params)
    shipped = "what is shipped"
    candidates = {shipped: waiting(plan_of(params, size, None), given)}
    candidates |= {rival.name: waiting(plan_of(params, size, rival), given) for rival in rivals}
    tensors = (params.query, params.key, params.value)
    others = (
        peers.of_pytorch() | peers.installed()
        if not (CALLS[call].keys() - {"is_causal"}) and call != "variable length"
        else {}
    )
    for name, attend in others.items():
        candidates[name] = finished(lambda attend=attend: attend(*tensors, is_causal=params.is_causal))
    with torch.no_grad():
        taken = alternate(candidates, turns, calls=1)
    milliseconds = {f"ms of {name}": round(taken.microseconds(name) / BURST / 1e3, 4) for name in candidates}
    for rival in rivals:
        to = {f"of {name}": round(taken.ratio(rival.name, to=name), 3) for name in others}
        yield (
            rival,
            Result(
                f"{rival.name}, head size {size}, {call}",
                round(taken.ratio(rival.name, to=shipped), 3),
                "ratio",
                aim=rival.expected[call],
                details=to | milliseconds,
            ),
        )


def waiting(plan: Plan, given: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that runs a plan; without a GPU, PyTorch's own in its place."""
    if peers.HAS_GPU:
        return finished(lambda: plan.run(given, given["query"].device))
    query = given["query"][None]
    return finished(lambda: sdpa(query, query, query))


def finished(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(BURST):
            call()
        peers.finish()

    return run


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
