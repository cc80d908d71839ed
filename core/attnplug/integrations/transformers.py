"""`attn_implementation="attnplug"` in unmodified models of Hugging Face transformers.

After `register()`, `"attnplug"` leaves the choice to attnplug (scopes, activation, priorities) and
`"attnplug:<implementation>"` is `impl=<implementation>`, in `from_pretrained`, `from_config` and
`set_attn_implementation`. Whatever a model asks of its attention is computed, or refused with an error that
names it: PyTorch's function knows neither softcap nor sinks, so transformers keeps models that need them away
from `"sdpa"`; here they are arguments of the call.

Masks are those of transformers' `"sdpa"`: boolean, with padding, causality, sliding windows, chunks and packed
sequences in them. A causal mask is left out, in favour of `is_causal`, only where that cannot be misread; see
`make_mask`. Models that transformers does not run with `"sdpa"` get the masks of its `"eager"`, and their
configuration then says `"attnplug+eager_masks"`: some rely on a mask that says everything and is added to logits.

The name is kept in the model's configuration: a second model, such as an eager one to compare with, needs a
`copy.deepcopy` of it, or both have the attention of the second. With activation checkpointing in a scope, call
`model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": attnplug.checkpoint_contexts})`, which is
`gradient_checkpointing_enable` in releases that do not have it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug._control.registration import check_name

__all__ = ["attention_forward", "make_mask", "register"]

FAMILY = "attnplug"
_EAGER_MASKS = "attnplug+eager_masks"
_TESTED = "5.24"
_NAME_CHECKS = ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation")

_HARMLESS = {
    "position_ids": "rotary embeddings are in query and key already, and packing is in the mask",
    "past_key_values": "the cache is in key and value already",
    "use_cache": "the cache is updated outside of attention",
    "encoder_hidden_states": "key and value are computed from it already",
    "decoder_input_ids": "embedded before attention",
    "output_hidden_states": "collected outside of attention",
    "output_router_logits": "collected outside of attention",
    "return_dict": "the form of the model's output",
    "num_items_in_batch": "a divisor of the loss",
    "shift_labels": "labels of the loss",
    "seq_idx": "for state-space layers; packing of attention is in the mask",
    "max_length_q": "cu_seq_lens_q says it",
    "max_length_k": "cu_seq_lens_k says it",
}
_UNSUPPORTED = {
    "output_attentions": "the probabilities are never stored; use attn_implementation='eager' to see them",
    "cache": "continuous batching keeps its own paged cache; use attn_implementation='sdpa' or 'paged|eager'",
}


def register() -> None:
    """Make `"attnplug"` and `"attnplug:<implementation>"` names of attention in transformers.

    Every registered implementation gets such a name; one that is registered later gets it when a model first asks
    for it. Calling this again changes nothing.

    transformers takes every name that contains `flash` for its own Flash Attention, and loads packages for it.
    So two methods of `PreTrainedModel` that look at the names are wrapped: they recognise names that begin with
    `attnplug:`, and otherwise do what they did.

    Raises:
        ImportError: transformers is missing, or of a version that this does not know.

    Examples:
        >>> import attnplug.integrations.transformers
        >>> attnplug.integrations.transformers.register()
        >>> from transformers import AutoModel, BertConfig
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = AutoModel.from_config(config, attn_implementation="attnplug:aten_flash")
    """
    model_class = _library("modeling_utils").PreTrainedModel
    makes_masks_by_length = "q_length" in inspect.signature(_library("masking_utils").sdpa_mask).parameters
    if not (makes_masks_by_length and all(hasattr(model_class, name) for name in _NAME_CHECKS)):
        version = _library("utils").__version__
        raise ImportError(
            f"attnplug.integrations.transformers does not know this version of transformers, {version}; "
            f"it is tested with {_TESTED} and needs at least 5.10"
        )
    for name in _NAME_CHECKS:
        method = getattr(model_class, name)
        if not hasattr(method, "__attnplug__"):
            setattr(model_class, name, _with_own_names(method))
    for impl in ("", *attnplug.list_flash_attention_impls()):
        _publish(FAMILY, impl)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    impl: str | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' attention functions do.

    Args:
        module: the attention layer; says `is_causal` where the argument does not, and whether it is training.
        query: `(B, Hq, Sq, E)`.
        key: `(B, Hkv, Sk, E)`.
        value: `(B, Hkv, Sk, Ev)`.
        attention_mask: what `make_mask` or the model made; `None` together with `is_causal` means causal,
            with the last query at the last key.
        dropout: a probability; ignored outside of training, as in the library's eager attention.
        scaling: factor of the logits; `None` is `1/sqrt(E)`.
        is_causal: whether a missing mask means a causal one.
        impl: the implementation; `None` leaves the choice to attnplug.
        sliding_window: how many keys a query sees; masks have it in them, so it acts only on a missing one.
        softcap: `logits = softcap * tanh(logits / softcap)`.
        s_aux: attention sinks `(Hq,)`.
        position_bias: added to the logits, broadcast to `(B, Hq, Sq, Sk)`.
        cu_seq_lens_q: where packed sequences start, and the end, `(sequences + 1,)`, for a batch of one.
        cu_seq_lens_k: the same for keys.
        others: whatever else the model was called with; what is not known to be harmless is an error.

    Returns:
        `(B, Sq, Hq, Ev)`, contiguous, and `None` in the place of the probabilities.

    Raises:
        ValueError: the model asks for something that attnplug cannot do.
    """
    refuse_unknown(others)
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask, causal = _complete_mask(query, key, attention_mask, causal, sliding_window)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        mask, causal = _keep_sequences_apart(query, key, mask, causal, cu_seq_lens_q, cu_seq_lens_k)
    if position_bias is not None:
        mask, causal = _add_bias(query, key, mask, causal, position_bias)
    out = attnplug.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=bool(causal),  # which `torch.jit.trace` makes a tensor of
        scale=scaling,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
        softcap=softcap or 0.0,
        sinks=s_aux,
        impl=impl,
    )
    return out.transpose(1, 2).contiguous(), None


def make_mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **arguments: Any) -> Tensor | None:
    """Return transformers' mask for its `"sdpa"`, boolean `(B, 1, Sq, Sk)`, or `None` where it needs none.

    transformers leaves out a causal mask also when a prompt is read into a longer static cache, which then
    means upper-left; but some models drop queries from a layer after the mask was made, and then a missing mask
    must mean lower-right. Only where both are the same is it left out here: equal lengths, or one query.

    Args:
        q_length: `Sq`.
        kv_length: `Sk`.
        allow_is_causal_skip: whether a mask that only says causal may be left out.
        **arguments: whatever else transformers gives to its own function.
    """
    # An import statement, as torch.compile traces it and not importlib.
    from transformers.masking_utils import sdpa_mask

    skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **arguments)


class _Name(str):
    """`attnplug:<implementation>`, in which transformers must find nothing of its own.

    It asks `"flash" in name`, `"sdpa" in name` and the like, and acts upon it: it would load the flash-attn
    package for `attnplug:aten_flash`, or hand packed sequences to it. Only the family's name answers.
    """

    def __contains__(self, part: object) -> bool:
        return isinstance(part, str) and part in FAMILY

    def startswith(self, *arguments: Any) -> bool:
        return str(self).startswith(*arguments)  # Dynamo of PyTorch 2.11 traces no method of `str` on another class

    def removeprefix(self, _prefix: str) -> str:
        return self  # `str` would answer with a plain string; transformers takes "paged|" off, which is not there

    def __reduce__(self) -> Any:
        return _restored, (str(self),)


torch.utils._pytree.register_constant(_Name)  # else Dynamo of PyTorch 2.11 takes it for an object, and not for a string


def _restored(name: str) -> _Name:
    """Return the name in a model that was saved or copied, known to transformers in this process too."""
    register()
    family, _, impl = name.partition(":")
    return _publish(family, impl)


def _with_own_names(method: Callable[..., str]) -> Callable[..., str]:
    """Wrap a method whose first argument is the name of an attention implementation."""

    @functools.wraps(method)
    def wrapper(self: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
        return method(self, _own_name(self, requested), *args, **kwargs)

    wrapper.__attnplug__ = True  # type: ignore[attr-defined]  # functions declare none
    return wrapper


def _own_name(model: Any, requested: str | None) -> str | None:
    """Return a name of ours checked, published and as this model needs it; any other as it is."""
    if not isinstance(requested, str):
        return requested
    family, colon, impl = requested.partition(":")
    if family not in (FAMILY, _EAGER_MASKS):
        return requested
    if colon:
        check_name(impl, where=f"attn_implementation={requested!r}")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation={requested!r}: {type(model).__name__} computes attention in its own code, which "
            f"ignores the name. If it is part of a model, name the other parts: "
            f"attn_implementation={{'text_config': {requested!r}}}"
        )
    return _publish(FAMILY if model._supports_sdpa else _EAGER_MASKS, impl)


@functools.cache
def _publish(family: str, impl: str) -> _Name:
    """Enter one name into transformers' tables of attention and mask functions."""
    name = f"{family}:{impl}" if impl else family
    attention = functools.partial(attention_forward, impl=impl or None)
    masks = _library("masking_utils")
    mask: Callable[..., Tensor | None] = make_mask
    if family == _EAGER_MASKS:
        mask = masks.eager_mask
        attention = functools.partial(attention, is_causal=False)  # no mask means no mask, whatever the layer says
    _library("modeling_utils").AttentionInterface.register(name, attention)
    masks.AttentionMaskInterface.register(name, mask)
    return _Name(name)


def _library(module: str) -> Any:
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("attnplug.integrations.transformers needs transformers: pip install transformers") from error
    return importlib.import_module(f"transformers.{module}")


def refuse_unknown(others: dict[str, Any]) -> None:
    """Raise for every argument that asks for something and is not known to change nothing here."""
    for name, value in others.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        reason = _UNSUPPORTED.get(
            name, "attnplug does not know what it means, and ignoring it could give wrong results"
        )
        raise ValueError(f"{name}: this model passes it to its attention, which attnplug does not support: {reason}")


def _complete_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, sliding_window: int | None
) -> tuple[Tensor | None, bool]:
    """Write out what a missing mask means where `is_causal` alone, upper-left and unlimited, would say less."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and sliding_window is not None and keys > sliding_window:
        if not causal:
            raise ValueError(f"sliding_window={sliding_window}: needs an attention_mask where attention is not causal")
        return _causal_mask(query, key, sliding_window), False
    if causal and queries == 1:
        return mask, False
    if causal and queries != keys:
        return _causal_mask(query, key), False
    return mask, causal


def _causal_mask(query: Tensor, key: Tensor, sliding_window: int | None = None) -> Tensor:
    """Return the boolean mask `(1, 1, Sq, Sk)` of a causal call whose last query stands at the last key."""
    shape, diagonal = (query.shape[2], key.shape[2]), key.shape[2] - query.shape[2]
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(diagonal)
    if sliding_window is not None:
        mask = mask.triu(diagonal - sliding_window + 1)
    return mask[None, None]


def _keep_sequences_apart(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, starts_q: Tensor | None, starts_k: Tensor | None
) -> tuple[Tensor, bool]:
    """Hide the keys of other sequences of a packed batch; the mask knows them only if it saw position_ids."""
    if starts_q is None:
        raise ValueError("cu_seq_lens_k: says where keys of packed sequences start, and cu_seq_lens_q is missing")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: packed sequences come in a batch of 1, this one has {query.shape[0]}")
    starts_k = starts_q if starts_k is None else starts_k
    of_query, of_key = (
        torch.bucketize(torch.arange(tensor.shape[2], dtype=starts.dtype, device=starts.device), starts, right=True)
        for tensor, starts in ((query, starts_q), (key, starts_k))
    )
    together = (of_query[:, None] == of_key)[None, None]
    if causal:
        together = together & _causal_mask(query, key)
    if mask is None:
        return together, False
    return (mask & together if mask.dtype == torch.bool else mask.masked_fill(~together, float("-inf"))), False


def _add_bias(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, bias: Tensor) -> tuple[Tensor, bool]:
    """Join a position bias and a mask into one additive mask; causality goes in as PyTorch takes only one of them."""
    bias = bias.to(query.dtype)
    mask = _causal_mask(query, key) if causal else mask
    if mask is None:
        return bias, False
    return (bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask), False
