"""Explain which implementation would run a call, and why each of the others would not.

Nothing runs and nothing is allocated, so a call on a device that this machine does not have can be explained too; with
--capability, what an NVIDIA GPU of that compute capability would run, with what is installed here. Where
neither --impl nor --scope says otherwise, torch comes first, until there are measurements. Where nothing would run, or
nothing but the formulas (MATH), the nearest miss is named, with what would let it run.
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
from attnplug._control.registration import check_name
from attnplug.cli import render, values
from attnplug.cli.parser import complete_with

HELP = "show which implementation would run a call, and why the others would not"
USAGE = "attnplug explain --query SHAPE [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    tensors = parser.add_argument_group("tensors")
    tensors.add_argument("--query", type=values.sizes, required=True, metavar="SHAPE", help="such as 1,8,128,64")
    tensors.add_argument("--key", type=values.sizes, metavar="SHAPE", help="as the query if not given")
    tensors.add_argument("--value", type=values.sizes, metavar="SHAPE", help="as the key if not given")
    tensors.add_argument("--dtype", type=values.dtype, default="float32", help=values.DTYPE_HELP)
    tensors.add_argument("--device", default="cpu", help="cpu (default), cuda, ...; need not be on this machine")
    tensors.add_argument(
        "--capability",
        dest="compute_capability",
        type=values.capability,
        metavar="X.Y",
        help="answer for an NVIDIA GPU of this compute capability, present or not; with --device cuda",
    )
    tensors.add_argument("--grad", action="store_true", help="query, key and value need gradients")
    _configure_mask(parser.add_argument_group("which query sees which key"))
    _configure_rest(parser.add_argument_group("the rest of the call"))
    choice = parser.add_argument_group("selection")
    impl = choice.add_argument("--impl", metavar="NAME", help="as impl= of the call")
    complete_with(impl, attnplug.list_flash_attention_impls)
    choice.add_argument(
        "--scope", type=values.names, metavar="NAMES", help="as inside sdpa_kernel: families, in any case, or names"
    )
    choice.add_argument("--set-priority", action="store_true", help="the order of --scope is the preference")


def _configure_mask(group: Any) -> None:
    group.add_argument("--causal", dest="is_causal", action="store_true", help="is_causal")
    group.add_argument(
        "--causal-variant",
        choices=("upper-left", "lower-right"),
        help="upper-left, but with --varlen lower-right",
    )
    group.add_argument(
        "--window", dest="window_size", type=values.window, metavar="LEFT,RIGHT", help="window_size; -1 is open"
    )
    group.add_argument(
        "--mask",
        dest="attn_mask",
        type=values.mask,
        metavar="bool|float[:SHAPE]",
        help="attn_mask; by default of shape (query length, key length)",
    )
    group.add_argument("--mask-grad", action="store_true", help="the mask needs a gradient")
    group.add_argument("--seqused", dest="seqused_k", action="store_true", help="seqused_k")
    group.add_argument(
        "--varlen",
        type=values.varlen,
        metavar="LENGTHS[:LENGTHS]",
        help="varlen_attn: lengths of the sequences, such as 5,3,8; the keys' after a colon if they differ",
    )
    group.add_argument(
        "--paged", type=values.size, metavar="PAGE_SIZE", help="block_table: keys in pages; with --varlen"
    )


def _configure_rest(group: Any) -> None:
    group.add_argument("--gqa", dest="enable_gqa", action="store_true", help="enable_gqa: fewer key than query heads")
    group.add_argument("--scale", type=float)
    group.add_argument("--dropout", dest="dropout_p", type=float, default=0.0, metavar="P", help="dropout_p")
    group.add_argument("--softcap", type=float, default=0.0)
    group.add_argument("--sinks", action="store_true", help="one more logit per head")
    group.add_argument("--sinks-grad", action="store_true", help="sinks that need a gradient")
    group.add_argument("--alibi", dest="alibi_slopes", action="store_true", help="alibi_slopes")
    group.add_argument("--lse", dest="return_lse", action="store_true", help="return_lse")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    scope = values.scope(arguments.scope or (), "--scope")

    from attnplug._control.explain import HEADERS
    from attnplug.cli.fake_calls import fake_call

    with attnplug.sdpa_kernel(scope, arguments.set_priority) if scope else nullcontext():
        try:
            explanation = attnplug.explain(
                **fake_call(arguments), impl=arguments.impl, compute_capability=arguments.compute_capability
            )
        except (TypeError, ValueError) as error:  # the message names the argument
            arguments.fail(str(error))
    if arguments.json:
        render.print_json(_as_json(explanation))
    else:
        rows = [(*cells, arguments.in_options(reasons)) for *cells, reasons in explanation.rows()]
        render.print_table(HEADERS, rows, HEADERS.index(""))
        advice = arguments.in_options(explanation.advice())
        render.put_prose(*filter(None, (advice, explanation.measured, _conclusion(explanation))))
    return 1 if explanation.chosen is None and not explanation.empty else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and names that do not exist, before torch is imported."""
    if arguments.impl is not None:
        check_name(arguments.impl, "--impl")
    if arguments.compute_capability is not None and arguments.device.partition(":")[0] != "cuda":
        arguments.fail(f"--capability: is that of an NVIDIA GPU, and --device is {arguments.device}; add --device cuda")
    if arguments.set_priority and not arguments.scope:
        arguments.fail("--set-priority: is about the order of --scope, which is not given")
    if arguments.mask_grad and (arguments.attn_mask is None or arguments.attn_mask[0] == "bool"):
        arguments.fail("--mask-grad: needs --mask float")
    if arguments.varlen is not None:
        if arguments.attn_mask is not None:
            arguments.fail("--mask: varlen_attn takes no attn_mask; leave out --mask or --varlen")
        if arguments.causal_variant == "upper-left":
            arguments.fail("--causal-variant: varlen_attn is always lower-right")
    elif arguments.paged is not None:
        arguments.fail("--paged: needs --varlen")


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
        "nearest": None if explanation.nearest is None else _verdict(explanation.nearest),
        "remedy": explanation.remedy,
        "measured": explanation.measured,
        "candidates": [_verdict(verdict) for verdict in explanation.candidates],
    }


def _verdict(verdict: attnplug.Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "family": verdict.backend.name if verdict.backend is not None else None,
        "accepted": verdict.accepted,
        "reasons": list(verdict.reasons),
        "notes": list(verdict.notes),
    }
