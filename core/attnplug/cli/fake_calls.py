"""The tensors of a call that nobody makes: shapes, dtypes and devices without memory.

PyTorch's fake tensors carry all that an explanation reads, and can be on a device that is not here. They
are made in fake mode and read outside it, so that kernels that are imported meanwhile are imported
as they always are.
"""

from __future__ import annotations

import argparse
import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnplug import CausalVariant

Lengths = tuple[int, ...]


def fake_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `attnplug.explain` for the command line `arguments`."""
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        arguments.fail(f"--device: {arguments.device!r} is not a device of PyTorch; examples: cpu, cuda, cuda:1")
    with FakeTensorMode(), device:
        return _varlen(arguments) if arguments.varlen else _dense(arguments)


def _dense(arguments: argparse.Namespace) -> dict[str, Any]:
    query, key, value = _tensors(arguments, arguments.key or arguments.query)
    shapes = [tensor.shape for tensor in (query, key, value)]
    batch = math.prod(max(sizes) for sizes in _leading([tuple(shape[:-3]) for shape in shapes]))
    heads = max(shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    variant = CausalVariant.LOWER_RIGHT if arguments.causal_variant == "lower-right" else CausalVariant.UPPER_LEFT
    call = {
        "query": query,
        "key": key,
        "value": value,
        "causal_variant": variant,
        **_common(arguments, heads),
    }
    if arguments.mask is not None:
        kind, shape = arguments.mask
        dtype = torch.bool if kind == "bool" else query.dtype
        shape = (query.shape[-2:-1] + key.shape[-2:-1]) if shape is None else shape
        call["attn_mask"] = torch.empty(shape, dtype=dtype, requires_grad=arguments.mask_grad)
    if arguments.seqused:
        call["seqused_k"] = torch.empty(batch, dtype=torch.int32)
    return call


def _leading(shapes: list[Lengths]) -> list[Lengths]:
    """Return the sizes of each leading dimension; whether they broadcast, the library checks."""
    rank = max(len(shape) for shape in shapes)
    return list(zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True))


def _varlen(arguments: argparse.Namespace) -> dict[str, Any]:
    queries, keys = arguments.varlen
    _check_tokens(arguments, "--query", arguments.query, queries)
    shape = arguments.key or (sum(keys), *arguments.query[1:])
    _check_tokens(arguments, "--key", shape, keys)
    query, key, value = _tensors(arguments, shape)
    call = {
        "cu_seq_q": _cumulative(queries),
        "cu_seq_k": _cumulative(keys),
        "max_q": max(queries),
        "max_k": max(keys),
    }
    if arguments.seqused:
        call["seqused_k"] = torch.empty(len(keys), dtype=torch.int32)
    if arguments.paged is not None:
        blocks = [-(-length // arguments.paged) for length in keys]
        key, value = (_paged(tensor, sum(blocks), arguments.paged) for tensor in (key, value))
        call["block_table"] = torch.empty(len(keys), max(blocks), dtype=torch.int32)
        if arguments.seqused:
            call["cu_seq_k"] = None  # the two together say where the keys are
    return {"query": query, "key": key, "value": value, **call, **_common(arguments, query.shape[1])}


def _check_tokens(arguments: argparse.Namespace, option: str, shape: Lengths, lengths: Lengths) -> None:
    if len(shape) != 3:
        arguments.fail(f"{option}: with --varlen expected tokens,heads,head size, got {','.join(map(str, shape))}")
    if shape[0] != sum(lengths):
        arguments.fail(f"{option}: has {shape[0]} tokens, but the lengths of --varlen add up to {sum(lengths)}")


def _cumulative(lengths: Lengths) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _paged(tensor: Tensor, pages: int, page_size: int) -> Tensor:
    return tensor.new_empty(pages, page_size, *tensor.shape[1:], requires_grad=tensor.requires_grad)


def _tensors(arguments: argparse.Namespace, key: Lengths) -> list[Tensor]:
    dtype = getattr(torch, arguments.dtype)
    shapes = (arguments.query, key, arguments.value or key)
    return [torch.empty(shape, dtype=dtype, requires_grad=arguments.grad) for shape in shapes]


def _common(arguments: argparse.Namespace, heads: int) -> dict[str, Any]:
    sinks = arguments.sinks or arguments.sinks_grad
    return {
        "is_causal": arguments.causal,
        "scale": arguments.scale,
        "enable_gqa": arguments.gqa,
        "window_size": arguments.window or (-1, -1),
        "softcap": arguments.softcap,
        "sinks": torch.empty(heads, requires_grad=arguments.sinks_grad) if sinks else None,
        "alibi_slopes": torch.empty(heads) if arguments.alibi else None,
        "dropout_p": arguments.dropout,
        "return_lse": arguments.lse,
    }
