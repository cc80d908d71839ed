"""The arguments of a call that is only described: tensors without memory, on a device that need not be here."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from attnplug import CausalVariant
from attnplug.cli.described import empty

Lengths = tuple[int, ...]


def fake_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `attnplug.explain` for the command line `arguments`."""
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        arguments.fail(f"--device: {arguments.device!r} is not a device of PyTorch; examples: cpu, cuda, cuda:1")
    return _varlen(arguments, device) if arguments.varlen else _dense(arguments, device)


def _dense(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    query, key, value = _tensors(arguments, arguments.key or arguments.query, device)
    shapes = [tensor.shape for tensor in (query, key, value)]
    batch = math.prod(max(sizes) for sizes in _leading([tuple(shape[:-3]) for shape in shapes]))
    heads = max(shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    variant = CausalVariant.LOWER_RIGHT if arguments.causal_variant == "lower-right" else CausalVariant.UPPER_LEFT
    call = {
        "query": query,
        "key": key,
        "value": value,
        "causal_variant": variant,
        **_common(arguments, heads, device),
    }
    if arguments.attn_mask is not None:
        kind, shape = arguments.attn_mask
        dtype = torch.bool if kind == "bool" else query.dtype
        shape = (query.shape[-2:-1] + key.shape[-2:-1]) if shape is None else shape
        call["attn_mask"] = empty(shape, dtype, device, arguments.mask_grad)
    if arguments.seqused_k:
        call["seqused_k"] = empty((batch,), torch.int32, device)
    return call


def _leading(shapes: list[Lengths]) -> list[Lengths]:
    """Return the sizes of each leading dimension; whether they broadcast, the library checks."""
    rank = max(len(shape) for shape in shapes)
    return list(zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True))


def _varlen(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    queries, keys = arguments.varlen
    _check_tokens(arguments, "--query", arguments.query, queries)
    shape = arguments.key or (sum(keys), *arguments.query[1:])
    _check_tokens(arguments, "--key", shape, keys)
    query, key, value = _tensors(arguments, shape, device)
    call = {
        "cu_seq_q": empty((len(queries) + 1,), torch.int32, device),
        "cu_seq_k": empty((len(keys) + 1,), torch.int32, device),
        "max_q": max(queries),
        "max_k": max(keys),
    }
    if arguments.seqused_k:
        call["seqused_k"] = empty((len(keys),), torch.int32, device)
    if arguments.paged is not None:
        blocks = [-(-length // arguments.paged) for length in keys]
        key, value = (_paged(tensor, sum(blocks), arguments.paged) for tensor in (key, value))
        call["block_table"] = empty((len(keys), max(blocks)), torch.int32, device)
        if arguments.seqused_k:
            call["cu_seq_k"] = None  # the two together say where the keys are
    return {"query": query, "key": key, "value": value, **call, **_common(arguments, query.shape[1], device)}


def _check_tokens(arguments: argparse.Namespace, option: str, shape: Lengths, lengths: Lengths) -> None:
    if len(shape) != 3:
        arguments.fail(f"{option}: with --varlen expected tokens,heads,head size, got {','.join(map(str, shape))}")
    if shape[0] != sum(lengths):
        arguments.fail(f"{option}: has {shape[0]} tokens, but the lengths of --varlen add up to {sum(lengths)}")


def _paged(tensor: Tensor, pages: int, page_size: int) -> Tensor:
    return tensor.new_empty(pages, page_size, *tensor.shape[1:], requires_grad=tensor.requires_grad)


def _tensors(arguments: argparse.Namespace, key: Lengths, device: torch.device) -> list[Tensor]:
    dtype = getattr(torch, arguments.dtype)
    shapes = (arguments.query, key, arguments.value or key)
    return [empty(shape, dtype, device, arguments.grad) for shape in shapes]


def _common(arguments: argparse.Namespace, heads: int, device: torch.device) -> dict[str, Any]:
    sinks = arguments.sinks or arguments.sinks_grad
    return {
        "is_causal": arguments.is_causal,
        "scale": arguments.scale,
        "enable_gqa": arguments.enable_gqa,
        "window_size": arguments.window_size or (-1, -1),
        "softcap": arguments.softcap,
        "sinks": empty((heads,), torch.float32, device, arguments.sinks_grad) if sinks else None,
        "alibi_slopes": empty((heads,), torch.float32, device) if arguments.alibi_slopes else None,
        "dropout_p": arguments.dropout_p,
        "return_lse": arguments.return_lse,
    }
