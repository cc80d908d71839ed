"""Tells attnplug about `efficient_cuda` and `cudnn`, the kernels that come with PyTorch for NVIDIA GPUs.

This module is read whenever implementations are listed, so it imports neither torch nor the kernels.
What depends on lengths, on the installed cuDNN or on combinations of features is asked of the kernels'
`supports`; here stands what holds for every call.
"""

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend, hookimpl

_CUTLASS_FEATURES = frozenset(
    {
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.MASK_GRADIENT,
        Feature.CAUSAL,
        Feature.UPPER_LEFT,
        Feature.LOWER_RIGHT,
        Feature.WINDOW,
        Feature.DROPOUT,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.LSE,
        Feature.SEQUSED_K,
        Feature.VARLEN,
    }
)
_CUTLASS = Capabilities(
    devices=("cuda",), dtypes=("float16", "float32"), compute_capability=(7, 0), features=_CUTLASS_FEATURES
) | Capabilities(devices=("cuda",), dtypes=("bfloat16",), compute_capability=(8, 0), features=_CUTLASS_FEATURES)

_CUDNN_SEQUENCES = Capabilities(
    devices=("cuda",),
    dtypes=("float16", "bfloat16"),
    compute_capability=(8, 0),
    head_sizes=range(8, 257, 8),
    features={
        Feature.CAUSAL,
        Feature.LOWER_RIGHT,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.LSE,
        Feature.VARLEN,
    },
)
_CUDNN_DENSE = Capabilities(
    devices=("cuda",),
    dtypes=("float16", "bfloat16"),
    compute_capability=(8, 0),
    head_sizes=range(8, 257, 8),
    features={
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.CAUSAL,
        Feature.UPPER_LEFT,
        Feature.LOWER_RIGHT,
        Feature.WINDOW,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.LSE,
    },  # no DROPOUT: of every eight queries cuDNN gives four the same mask
)


@hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    """Return both implementations."""
    return [
        ImplSpec(
            name="efficient_cuda",
            kernel="attnplug_efficient_cuda.efficient",
            backend=SDPBackend.EFFICIENT_ATTENTION,
            capabilities=_CUTLASS,
            priority=-20,
        ),
        ImplSpec(
            name="cudnn",
            kernel="attnplug_efficient_cuda.cudnn",
            backend=SDPBackend.CUDNN_ATTENTION,
            capabilities=_CUDNN_SEQUENCES | _CUDNN_DENSE,
            priority=-10,
        ),
    ]
