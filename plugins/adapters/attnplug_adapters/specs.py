"""What each library supports, as far as it can be said without importing it.

The priorities stand behind those of attnplug's other plugins until there are measurements.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend

_HALF = ("float16", "bfloat16")
_LOWER_RIGHT = {Feature.CAUSAL, Feature.LOWER_RIGHT, Feature.GQA, Feature.LSE}
_SEQUENCES = {Feature.VARLEN, Feature.SEQUSED_K, Feature.PAGED}
_SINKS = {Feature.SINKS, Feature.SINKS_GRADIENT}

FLASH_ATTN2 = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(8, 0),
    head_sizes=range(1, 257),
    features=_LOWER_RIGHT | _SEQUENCES | _SINKS | {Feature.WINDOW, Feature.SOFTCAP, Feature.ALIBI, Feature.DROPOUT},
)
FLASH_ATTN3 = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(9, 0),
    head_sizes=range(1, 257),
    features=_LOWER_RIGHT | _SEQUENCES | _SINKS | {Feature.WINDOW, Feature.SOFTCAP, Feature.VALUE_HEAD_SIZE},
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
    | _SINKS
    | {Feature.WINDOW, Feature.SOFTCAP, Feature.LSE_GRADIENT, Feature.VALUE_HEAD_SIZE},
)
SAGE_ATTENTION = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(8, 0),
    head_sizes=range(1, 129),
    features={Feature.CAUSAL, Feature.GQA, Feature.LSE, Feature.VARLEN},
    quantized=True,
)
SAGE_ATTENTION1 = replace(
    SAGE_ATTENTION,
    dtypes=frozenset({*_HALF, "float32"}),
    features=frozenset(SAGE_ATTENTION.features) - {Feature.LSE},
    alternatives=(),
)
_XFORMERS = Capabilities(
    devices=("cuda",),
    dtypes=("float16", "float32"),
    compute_capability=(5, 0),
    head_sizes=range(1, 513),  # the library's own limit is 65,536; autoencoders of images have 512
    features=_LOWER_RIGHT
    | _SINKS
    | {
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.UPPER_LEFT,
        Feature.WINDOW,
        Feature.VALUE_HEAD_SIZE,
        Feature.VARLEN,
        Feature.SEQUSED_K,
    },
)
XFORMERS = _XFORMERS | replace(_XFORMERS, dtypes=frozenset({"bfloat16"}), compute_capability=(8, 0), alternatives=())
FLASHINFER = Capabilities(
    devices=("cuda",),
    dtypes=_HALF,
    compute_capability=(8, 0),
    head_sizes=(64, 128, 256),
    features=_LOWER_RIGHT | _SEQUENCES | {Feature.WINDOW, Feature.SOFTCAP, Feature.SINKS},
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
    features=_FLEX | _SINKS | {Feature.LSE, Feature.LSE_GRADIENT},
)


def all_specs() -> list[ImplSpec]:
    """Return the specification of every adapter."""
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    return [
        _spec("flash_attn4", flash, FLASH_ATTN4, -31, "flash_attn.cute.interface", "pip install --pre flash-attn-4"),
        _flash_attn3(),
        _spec(
            "flash_attn2",
            flash,
            FLASH_ATTN2,
            -33,
            "flash_attn.flash_attn_interface",
            "pip install flash-attn --no-build-isolation",  # its build asks the torch that is there
        ),
        _spec("xformers", efficient, XFORMERS, -34, "xformers.ops", "pip install xformers"),
        _spec("flashinfer", flash, FLASHINFER, -35, "flashinfer", "pip install flashinfer-python"),
        _spec("sage_attention", flash, _sage_attention(), -36, "sageattention", "pip install sageattention"),
        ImplSpec(
            name="flex",
            kernel="attnplug_adapters.flex",
            backend=flash,
            capabilities=FLEX_CPU | FLEX_CUDA,
            priority=-60,
        ),
    ]


def _spec(
    name: str, backend: SDPBackend, capabilities: Capabilities, priority: int, needs: str, install: str
) -> ImplSpec:
    return ImplSpec(
        name=name,
        kernel=f"attnplug_adapters.{name}:kernel",
        backend=backend,
        capabilities=capabilities,
        priority=priority,
        requires=(needs,),
        install=install,
    )


def _sage_attention() -> Capabilities:
    """Return what the installed version supports: an lse from 2.0 on."""
    if find_spec("sageattention") is None:
        return SAGE_ATTENTION
    from importlib.metadata import PackageNotFoundError, version  # 10 ms, which those without the library need not pay

    try:
        return SAGE_ATTENTION1 if version("sageattention").startswith("1.") else SAGE_ATTENTION
    except PackageNotFoundError:
        return SAGE_ATTENTION


def _flash_attn3() -> ImplSpec:
    """Return FlashAttention 3: the build from source, or the wheel where only that is installed."""
    wheel = find_spec("flash_attn_interface") is None and find_spec("fa3_fwd_interface") is not None
    return ImplSpec(
        name="flash_attn3",
        kernel=f"attnplug_adapters.flash_attn3:{'wheel' if wheel else 'source'}",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=FLASH_ATTN3_WHEEL if wheel else FLASH_ATTN3,
        priority=-32,
        requires=("fa3_fwd_interface",) if wheel else ("flash_attn_interface",),
        install="pip install fa3-fwd",  # forward only; docs/adapters/flash_attn3.md says how to build the other
    )
