"""Tells attnplug about `flash_triton`.

This module is read whenever implementations are listed, so it imports neither torch nor triton.
"""

import os

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend, hookimpl

HEAD_SIZES = range(8, 257)

FEATURES = frozenset(
    {
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.MASK_GRADIENT,
        Feature.CAUSAL,
        Feature.UPPER_LEFT,
        Feature.LOWER_RIGHT,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.SINKS_GRADIENT,
        Feature.ALIBI,
        Feature.DROPOUT,
        Feature.VARLEN,
        Feature.SEQUSED_K,
        Feature.PAGED,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.LSE,
        Feature.LSE_GRADIENT,
        Feature.DETERMINISTIC,
    }
)


def _interpreted() -> bool:
    """Whether Triton will interpret the kernels, by its own rule; asking Triton would import it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    """Return the one implementation of this distribution: on a GPU, or on the CPU in Triton's interpreter."""
    on_gpu = Capabilities(
        devices=("cuda",),
        dtypes=("float16", "bfloat16", "float32"),
        compute_capability=(8, 0),
        architectures=("gfx942",),
        head_sizes=HEAD_SIZES,
        features=FEATURES,
    )
    # The interpreter's products of bfloat16 are wrong: it multiplies the bits as if they were integers
    # (https://github.com/triton-lang/triton/issues/11584).
    in_interpreter = Capabilities(
        devices=("cpu",), dtypes=("float16", "float32"), head_sizes=HEAD_SIZES, features=FEATURES
    )
    return [
        ImplSpec(
            name="flash_triton",
            kernel="attnplug_flash_triton.impl",
            backend=SDPBackend.FLASH_ATTENTION,
            # Ahead of `aten_flash`: on an H100 1.3 to 2.9 times as fast forward, and 1.8 to 2.1 times backward
            # (docs/gpu.md). The interpreter is for debugging.
            priority=0 if _interpreted() else 10,
            capabilities=in_interpreter if _interpreted() else on_gpu,
            requires=("triton",),
        )
    ]
