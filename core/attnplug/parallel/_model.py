"""Modules whose attention runs over several ranks: any module that calls attnplug, and models of transformers."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplug._arguments import expect
from attnplug._control.binding import bind
from attnplug._control.registration import check_name, register_impl, unregister_impl
from attnplug._control.scopes import run_in
from attnplug._errors import UnknownImplementationError, did_you_mean
from attnplug._handles import Removable
from attnplug._registry.kernel import OfOneRank
from attnplug._selection.state import OUTSIDE
from attnplug._types import OPEN_WINDOW, Capabilities, Feature, ImplSpec, SDPAParams
from attnplug.integrations.transformers import refuse_unknown
from attnplug.parallel._attention import ring_attention, ulysses_attention, usp_attention
from attnplug.parallel._exchange import as_group, as_mesh
from attnplug.parallel._methods import ulysses, usp
from attnplug.parallel._ring import FEATURES, Ring
from attnplug.parallel._sharding import sequence_positions, shard_sequence

METHODS: dict[str, Any] = {"ring": ring_attention, "ulysses": ulysses_attention, "usp": usp_attention}
IGNORED = -100
"""The label of a token that does not count in the loss, in transformers and in PyTorch."""
_PREFIX = "attnplug_parallel_"
"""Of the names of attention that models get in transformers."""
_numbers = itertools.count()


class ContextParallelHandle(Removable):
    """Undoes one `context_parallel()`; also a context manager."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        """What puts back what there was, the last one first. Each may be called twice, or before anything changed."""

    def __repr__(self) -> str:
        return f"<ContextParallelHandle: {'in place' if self._undo else 'removed'}>"

    def remove(self) -> None:
        """Run the module's attention on one rank again; a second call does nothing."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()  # afterwards: what is interrupted before can be repeated


def context_parallel(
    module: torch.nn.Module, mesh: Any, method: str = "ring", *, is_causal: bool = True, impl: str | None = None
) -> ContextParallelHandle:
    """Let the attention of a module run over a sequence that the ranks of a mesh share.

    A model of transformers, loaded with any `attn_implementation` that takes a name, is then called with whole
    batches, the same on each rank: `input_ids` or `inputs_embeds`, `position_ids`, and `labels` or `shift_labels`.
    Each rank cuts its part and gets the outputs of that, such as `logits (B, part, vocabulary)`; `loss` is that of the
    whole batch, the same on each rank, and its gradients are right once they are averaged over the ranks, as
    `DistributedDataParallel` and `fully_shard` average them. Batches are dense: no padding, no cache.

    Any other module is called with what each rank has (`shard_sequence`): every call of
    `attnplug.scaled_dot_product_attention` in its forward, and of PyTorch's function while `patch_torch()` or an
    activation is in place, is one over all ranks.

    Args:
        module: the model or module.
        mesh: the ranks: a process group or a device mesh of one dimension; for `usp`, of two, `(ring, heads)`.
        method: `"ring"`, `"ulysses"` or `"usp"`.
        is_causal: whether attention is causal, which says how a sequence is cut.
        impl: the implementation that must compute on each rank; None leaves the choice to attnplug.

    Returns:
        A handle; its `remove()` undoes it, as does the end of a `with` block.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model's attention takes no name, or runs over several ranks
            already.
        UnknownImplementationError: `impl` names no implementation.

    In a call of the model, NoImplementationError and ParallelError are raised as by the function of the method, and
    ValueError for what has no meaning on a part of the sequence: padding, a cache, an unknown tensor along it.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"method: unknown {method!r}{did_you_mean(str(method), METHODS) or '.'} Accepted: {', '.join(METHODS)}"
        )
    expect("is_causal", is_causal, bool, "a bool")
    if impl is not None:
        check_name(impl, "impl")
    ranks = as_mesh(mesh) if method == "usp" else as_group(mesh, "mesh")
    handle = ContextParallelHandle()
    try:
        if hasattr(module, "set_attn_implementation"):
            _Model(module, ranks, method, is_causal, impl).put_in_place(handle._undo)
        else:
            _bind(module, ranks, method, impl, handle._undo)
        return handle
    except BaseException:  # after an interrupt, too, nothing stays
        handle.remove()
        raise


def _bind(module: torch.nn.Module, ranks: Any, method: str, impl: str | None, undo: list[Callable[[], object]]) -> None:
    """Bind a module to an implementation of its own."""
    kernel = Ring(weakref.ref(ranks), impl, scoped=False) if method == "ring" else _ByHeads(ranks, impl)
    features = FEATURES - {Feature.VARLEN} | {Feature.UPPER_LEFT, Feature.LOWER_RIGHT}
    if method == "ulysses":
        features |= {Feature.ALIBI}
    spec = ImplSpec(
        name=f"context_parallel_{method}_{next(_numbers)}",
        kernel=kernel,
        backend=None,
        capabilities=Capabilities(features=features),
        named_only=True,
    )

    def unregister() -> None:
        with suppress(UnknownImplementationError):
            unregister_impl(spec.name)

    undo.append(unregister)
    register_impl(spec)
    undo.append(bind(module, spec.name).remove)


class _ByHeads(OfOneRank):
    """The kernel of a module whose ranks share heads: made of operators, and of whatever attends on one rank."""

    composite = True
    supports = staticmethod(Ring.supports)

    def __init__(self, ranks: Any, impl: str | None) -> None:
        self._ranks, self._impl = ranks, impl

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor | None]:
        run = ulysses if isinstance(self._ranks, dist.ProcessGroup) else usp
        return run_in(OUTSIDE, run, params, self._ranks, self._impl)


class _Model:
    """A model of transformers."""

    def __init__(self, model: Any, ranks: Any, method: str, is_causal: bool, impl: str | None) -> None:
        self.model, self.ranks, self.method, self.impl = model, ranks, method, impl
        self.is_causal = is_causal
        self.folded = is_causal and method != "ulysses"
        self.length: int | None = None  # of the sequence that the model was called with last

    def put_in_place(self, undo: list[Callable[[], object]]) -> None:
        from transformers.modeling_utils import AttentionInterface

        config = self.model.config
        if getattr(config, "attention_chunk_size", None) is not None:
            raise ValueError(
                f"module: {type(self.model).__name__} attends within chunks, which is not "
                "supported when the sequence is split"
            )
        before, name = config._attn_implementation, f"{_PREFIX}{next(_numbers)}"
        if str(before).startswith(_PREFIX):
            raise ValueError(
                f"module: {type(self.model).__name__} runs over several ranks already; remove() that handle first"
            )
        # transformers makes no mask for a name that has none: it would be that of one rank's part.
        AttentionInterface.register(name, _weak(self.attention))
        undo.append(lambda: self.model.set_attn_implementation(before))
        self.model.set_attn_implementation(name)
        undo.append(self.model.register_forward_pre_hook(self.cut, with_kwargs=True).remove)
        undo.append(self.model.register_forward_hook(self.joined).remove)

    def attention(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend as the attention functions of transformers do, over all ranks."""
        refuse_unknown(others)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if attention_mask is not None or causal != self.is_causal:
            what = (
                "attention_mask: parts of a sequence take none"
                if attention_mask is not None
                else (f"is_causal: a layer says {causal}, and context_parallel was told {self.is_causal}")
            )
            raise ValueError(f"{what}; {type(module).__name__} cannot run over several ranks like this")
        where = {"mesh": self.ranks} if self.method == "usp" else {"group": self.ranks}
        out = METHODS[self.method](
            query,
            key,
            value,
            **where,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            window_size=OPEN_WINDOW if sliding_window is None else (sliding_window - 1, -1 if causal else 0),
            softcap=softcap or 0.0,
            sinks=s_aux,
            dropout_p=dropout if module.training else 0.0,
            length=self.length,
            impl=self.impl,
        )
        return out.transpose(1, 2).contiguous(), None

    def cut(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut what the model is called with."""
        names = inspect.signature(model.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise ValueError("input_ids or inputs_embeds: expected a whole batch (B, S, ...), the same on each rank")
        length = self.length = tokens.shape[1]
        mask = given.pop("attention_mask", None)
        if mask is not None and not (mask.dim() == 2 and bool(mask.all())):
            raise ValueError("attention_mask: batches over several ranks are dense; leave out padding and masks")
        if given.get("past_key_values") is not None:
            raise ValueError("past_key_values: a cache holds the keys of one rank's part; call without one")
        given.setdefault("use_cache", False)
        if given.get("position_ids") is None:
            positions = sequence_positions(length, group=self.ranks, is_causal=self.folded, device=tokens.device)
            given["position_ids"] = positions[None]
        else:
            given["position_ids"] = self._cut(given["position_ids"], -1)
        self._cut_labels(given)
        for name in ("input_ids", "inputs_embeds"):
            if given.get(name) is not None:
                given[name] = self._cut(given[name], 1)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length and length > 1:
                part = given["position_ids"].shape[-1]
                if part != length:
                    raise ValueError(f"{name}: context_parallel does not know how this is cut along the sequence")
        return (), given

    def _cut_labels(self, given: dict[str, Any]) -> None:
        """Shift labels while they are whole, and say by how many the loss is to be divided."""
        labels = given.get("shift_labels")
        if labels is None:
            labels = given.get("labels")
            if labels is None:
                return
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
        if given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = (labels != IGNORED).sum()
        given["labels"] = given["shift_labels"] = self._cut(labels, -1)

    def joined(self, model: Any, args: tuple[Any, ...], outputs: Any) -> Any:
        """Return outputs with the loss of all ranks."""
        loss = getattr(outputs, "loss", None)
        if loss is not None:
            outputs.loss = _Sum.apply(loss, self.ranks)
        return outputs

    def _cut(self, tensor: Tensor, dim: int) -> Tensor:
        return shard_sequence(tensor, group=self.ranks, dim=dim, is_causal=self.folded)


def _weak(method: Any) -> Any:
    """Return a function that does what a method does, and keeps nothing alive: transformers forgets no name."""
    found = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        return found()(*args, **kwargs)  # type: ignore[misc]  # it is there: hooks of the model that calls have it

    return call


class _Sum(torch.autograd.Function):
    """The sum over ranks of what each has; each has the sum then, so their gradients are summed too."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, share: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        return _summed(share, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.ranks), None


def _summed(tensor: Tensor, ranks: Any) -> Tensor:
    tensor = tensor.detach().clone()
    groups = [ranks] if isinstance(ranks, dist.ProcessGroup) else [ranks.get_group(0), ranks.get_group(1)]
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor
