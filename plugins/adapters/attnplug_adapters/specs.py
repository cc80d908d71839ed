"""What each library supports, as far as it can be said without importing it.

The priorities stand behind those of attnplug's other plugins until there are measurements.
"""

from __future__ import annotations

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend

_HALF = ("float16", "bfloat16")
_LOWER_RIGHT = {Feature.CAUSAL, Feature.LOWER_RIGHT, Feature.GQA, Feature.LSE}
_SEQUENCES = {Feature.VARLEN, Feature.SEQUSED_K, Feature.PAGED}

FLASH_ATTN2 = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(8, 0),
    head_sizes=range(1, 257),
    features=_LOWER_RIGHT | _SEQUENCES | {Feature.WINDOW, Feature.SOFTCAP, Feature.ALIBI, Feature.DROPOUT},
)
FLASH_ATTN3 = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(9, 0),
    head_sizes=range(1, 257),
    features=_LOWER_RIGHT | _SEQUENCES | {Feature.WINDOW, Feature.SOFTCAP, Feature.VALUE_HEAD_SIZE},
)
FLASH_ATTN3_WHEEL = Capabilities(
    devices=("cuda",),
    dtypes=("bfloat16",),
    compute_capability=(9, 0),
    head_sizes=range(1, 257),
    features=frozenset(FLASH_ATTN3.features) - {Feature.WINDOW, Feature.PAGED},
)
FLASH_ATTN4 = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(9, 0),
    head_sizes=range(1, 257),
    features=_LOWER_RIGHT
    | _SEQUENCES
    | {
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.SINKS_GRADIENT,
        Feature.LSE_GRADIENT,
        Feature.VALUE_HEAD_SIZE,
    },
)
_FLEX = {
    Feature.BOOLEAN_MASK,
    Feature.ADDITIVE_MASK,
    Feature.CAUSAL,
    Feature.UPPER_LEFT,
    Feature.LOWER_RIGHT,
    Feature.WINDOW,
    Feature.SOFTCAP,
    Feature.ALIBI,
    Feature.GQA,
    Feature.VALUE_HEAD_SIZE,
    Feature.SEQUSED_K,
    Feature.VARLEN,
    Feature.PAGED,
}
FLEX_CPU = Capabilities(devices=("cpu",), dtypes=(*_HALF, "float32"), features=_FLEX)
FLEX_CUDA = Capabilities(
    devices=("cuda",),
    dtypes=(*_HALF, "float32"),
    compute_capability=(8, 0),
    head_sizes=range(16, 257),
    features=_FLEX | {Feature.LSE, Feature.LSE_GRADIENT, Feature.SINKS, Feature.SINKS_GRADIENT},
)


def all_specs() -> list[ImplSpec]:
    """Return the specification of every adapter."""
    return [
        ImplSpec(
            name="flash_attn2",
            kernel="attnplug_adapters.flash_attn2:kernel",
            backend=SDPBackend.FLASH_ATTENTION,
            capabilities=FLASH_ATTN2,
            priority=-33,
            requires=("flash_attn.flash_attn_interface",),
        ),
        ImplSpec(
            name="flex",
            kernel="attnplug_adapters.flex",
            backend=SDPBackend.FLASH_ATTENTION,
            capabilities=FLEX_CPU | FLEX_CUDA,
            priority=-60,
        ),
    ]
