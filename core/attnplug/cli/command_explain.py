"""Say which implementation would run a call, and for every other each reason why not.

Nothing runs and nothing is allocated, so a call on a device that is not here can be asked about too; with
--capability, what an NVIDIA GPU of that compute capability would run, with what is installed here. Where
neither --impl nor --scope says otherwise, torch comes first, until there are measurements.
Shapes are those of scaled_dot_product_attention, (..., heads, length, head size); with --varlen those
of varlen_attn, (tokens, heads, head size). Exit status 1: nothing would run.

examples:
  attnplug explain --query 1,8,128,64 --causal
  attnplug explain --query 2,32,1,128 --key 2,8,4096,128 --gqa --dtype bfloat16 --device cuda
  attnplug explain --query 2,8,1024,128 --dtype bfloat16 --device cuda --capability 9.0 --softcap 30
  attnplug explain --query 16,8,64 --varlen 5,3,8 --paged 16 --seqused --scope FLASH_ATTENTION
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import attnplug
from attnplug import SDPBackend
from attnplug._control.registration import check_name
from attnplug.cli import render

HELP = "say which implementation would run a call, and why not the others"
USAGE = "attnplug explain --query SHAPE [options]"

_HEADERS = ("implementation", "family", "", "reasons")


def configure(parser: argparse.ArgumentParser) -> None:
    tensors = parser.add_argument_group("tensors")
    tensors.add_argument("--query", type=sizes, required=True, metavar="SHAPE", help="such as 1,8,128,64")
    tensors.add_argument("--key", type=sizes, metavar="SHAPE", help="as the query if not given")
    tensors.add_argument("--value", type=sizes, metavar="SHAPE", help="as the key if not given")
    tensors.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    tensors.add_argument("--device", default="cpu", help="cpu (default), cuda, ...; need not be here")
    tensors.add_argument(
        "--capability",
        type=capability,
        metavar="X.Y",
        help="answer for an NVIDIA GPU of this compute capability, here or not; with --device cuda",
    )
    tensors.add_argument("--grad", action="store_true", help="query, key and value need gradients")
    _configure_mask(parser.add_argument_group("who sees whom"))
    _configure_rest(parser.add_argument_group("the rest of the call"))
    choice = parser.add_argument_group("selection")
    choice.add_argument("--impl", metavar="NAME", help="as impl= of the call")
    choice.add_argument("--scope", type=names, metavar="NAMES", help="as inside sdpa_kernel: families or names")
    choice.add_argument("--set-priority", action="store_true", help="the order of --scope is the preference")


def _configure_mask(group: Any) -> None:
    group.add_argument("--causal", action="store_true", help="is_causal")
    group.add_argument(
        "--causal-variant",
        choices=("upper-left", "lower-right"),
        help="upper-left, but with --varlen lower-right",
    )
    group.add_argument("--window", type=window, metavar="LEFT,RIGHT", help="window_size; -1 is open")
    group.add_argument(
        "--mask",
        type=mask,
        metavar="bool|float[:SHAPE]",
        help="attn_mask, of (query length, key length) if no SHAPE",
    )
    group.add_argument("--mask-grad", action="store_true", help="the mask needs a gradient")
    group.add_argument("--seqused", action="store_true", help="seqused_k")
    group.add_argument(
        "--varlen",
        type=varlen,
        metavar="LENGTHS[:LENGTHS]",
        help="varlen_attn: lengths of the sequences, such as 5,3,8; the keys' after a colon if they differ",
    )
    group.add_argument("--paged", type=size, metavar="PAGE_SIZE", help="block_table: keys in pages; with --varlen")


def _configure_rest(group: Any) -> None:
    group.add_argument("--gqa", action="store_true", help="enable_gqa: fewer key than query heads")
    group.add_argument("--scale", type=float)
    group.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout_p")
    group.add_argument("--softcap", type=float, default=0.0)
    group.add_argument("--sinks", action="store_true", help="one more logit a head")
    group.add_argument("--sinks-grad", action="store_true", help="sinks that need a gradient")
    group.add_argument("--alibi", action="store_true", help="alibi_slopes")
    group.add_argument("--lse", action="store_true", help="return_lse")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    scope = _scope(arguments)

    from attnplug.cli.fake_calls import fake_call

    with attnplug.sdpa_kernel(scope, arguments.set_priority) if scope else nullcontext():
        try:
            explanation = attnplug.explain(
                **fake_call(arguments), impl=arguments.impl, compute_capability=arguments.capability
            )
        except (TypeError, ValueError) as error:  # the message names the argument
            arguments.fail(str(error))
    if arguments.json:
        render.print_json(_as_json(explanation))
    else:
        render.print_table(_HEADERS, [_row(verdict, explanation) for verdict in explanation.candidates], 2)
        render.put(f"\n{_conclusion(explanation)}")
        if explanation.measured:
            render.put(explanation.measured)
    return 1 if explanation.chosen is None and not explanation.empty else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and names that do not exist, before torch is imported."""
    if arguments.impl is not None:
        check_name(arguments.impl, "--impl")
    if arguments.capability is not None and arguments.device.partition(":")[0] != "cuda":
        arguments.fail(f"--capability: is that of an NVIDIA GPU, and --device is {arguments.device}; add --device cuda")
    if arguments.set_priority and not arguments.scope:
        arguments.fail("--set-priority: is about the order of --scope, which is not given")
    if arguments.mask_grad and (arguments.mask is None or arguments.mask[0] == "bool"):
        arguments.fail("--mask-grad: needs --mask float")
    if arguments.varlen is not None:
        if arguments.mask is not None:
            arguments.fail("--mask: varlen_attn takes no attn_mask; leave out --mask or --varlen")
        if arguments.causal_variant == "upper-left":
            arguments.fail("--causal-variant: varlen_attn is always lower-right")
    elif arguments.paged is not None:
        arguments.fail("--paged: needs --varlen")


def _scope(arguments: argparse.Namespace) -> list[Any]:
    """Return what `sdpa_kernel` takes: implementations by name, families as `SDPBackend`."""
    families = {backend.name: backend for backend in SDPBackend if backend is not SDPBackend.ERROR}
    for name in arguments.scope or ():
        check_name(name, "--scope", also=families)
    return [families.get(name, name) for name in arguments.scope or ()]


def _row(verdict: attnplug.Verdict, explanation: attnplug.Explanation) -> tuple[str, str, str, str]:
    answer = "runs" if verdict.name == explanation.chosen else "could" if verdict.accepted else "no"
    return (verdict.name, render.family(verdict.backend), answer, "; ".join(verdict.reasons))


def _conclusion(explanation: attnplug.Explanation) -> str:
    if explanation.empty:
        return "No kernel would run: some size is zero, and the result follows from the formulas."
    if explanation.chosen is None:
        return "Nothing would run: no implementation that is allowed supports this call."
    return f"{explanation.chosen} would run."


def _as_json(explanation: attnplug.Explanation) -> dict[str, Any]:
    return {
        "chosen": explanation.chosen,
        "empty": explanation.empty,
        "measured": explanation.measured,
        "candidates": [
            {
                "name": verdict.name,
                "family": verdict.backend.name if verdict.backend is not None else None,
                "accepted": verdict.accepted,
                "reasons": list(verdict.reasons),
            }
            for verdict in explanation.candidates
        ],
    }


def sizes(text: str) -> tuple[int, ...]:
    """Read sizes or lengths such as `1,8,128,64`."""
    try:
        read = tuple(int(part) for part in text.split(","))
    except ValueError:
        read = (-1,)
    if min(read) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,8,128,64, got {text!r}")
    return read


def capability(text: str) -> tuple[int, int]:
    """Read a compute capability such as `9.0`; which there may be, the library checks."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a compute capability such as 9.0 or 12.0, got {text!r}")
    return int(major), int(minor)


def size(text: str) -> int:
    """Read one size above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def window(text: str) -> tuple[int, ...]:
    """Read the two sides of a window; what they may be, the library checks."""
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LEFT,RIGHT such as 256,0 or -1,0, got {text!r}") from None
    return left, right


def mask(text: str) -> tuple[str, tuple[int, ...] | None]:
    """Read `bool`, `float`, or one of them with a shape, such as `bool:1,1,128,128`."""
    kind, colon, shape = text.partition(":")
    if kind not in ("bool", "float"):
        raise argparse.ArgumentTypeError(f"expected bool or float, with :SHAPE or without, got {text!r}")
    return kind, sizes(shape) if colon else None


def varlen(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read the lengths of the sequences of queries and, after a colon, of keys: `5,3,8` or `1,1:12,40`."""
    queries, colon, keys = text.partition(":")
    lengths = sizes(queries), sizes(keys if colon else queries)
    if len(lengths[0]) != len(lengths[1]):
        raise argparse.ArgumentTypeError(f"expected as many sequences of keys as of queries, got {text!r}")
    return lengths


def names(text: str) -> list[str]:
    """Read names separated by commas."""
    return [part.strip() for part in text.split(",")]
