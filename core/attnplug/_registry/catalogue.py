"""The names of this project's plugins, so that one that is not installed can be named with what brings it.

What is written here is what an error may promise before anything is installed; the plugins say it themselves
when they are, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnplug._types import Capabilities, Feature, ImplSpec, SDPBackend

OWN = frozenset(
    {"attnplug", "attnplug-math-ref", "attnplug-flash-triton", "attnplug-efficient-cuda"},
)
"""The distributions whose implementations come before all others.

`attnplug-adapters` is not among them: its kernels are third-party, and available once their packages are installed,
for whatever reason; that must not take a call away from what ran before.
"""


@dataclass(frozen=True)
class Known:
    """An implementation of this project: its entry point, the extra that installs it, and what it supports.

    `spec` is None for kernels whose own packages must be there too; no call is promised anything of them.
    """

    entry_point: str
    extra: str
    spec: ImplSpec | None = None

    @property
    def install(self) -> str:
        return f"pip install 'attnplug[{self.extra}]'"


def _spec(name: str, backend: SDPBackend, capabilities: Capabilities) -> ImplSpec:
    return ImplSpec(name=name, kernel=name, backend=backend, capabilities=capabilities)


_HALF, _FULL = ("float16", "bfloat16"), ("float32", "float64")
_CUDNN = frozenset({Feature.CAUSAL, Feature.LOWER_RIGHT, Feature.GQA, Feature.VALUE_HEAD_SIZE, Feature.LSE})
_MASKS = frozenset({Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.UPPER_LEFT, Feature.WINDOW})

KNOWN = {
    "math_ref": Known(
        "math_ref",
        "math",
        _spec(
            "math_ref",
            SDPBackend.MATH,
            Capabilities(dtypes=(*_HALF, *_FULL), features=frozenset(Feature) - {Feature.NESTED}),
        ),
    ),
    "flash_triton": Known(
        "flash_triton",
        "triton",
        _spec(
            "flash_triton",
            SDPBackend.FLASH_ATTENTION,
            Capabilities(
                devices=("cuda",),
                dtypes=(*_HALF, "float32"),
                compute_capability=(8, 0),
                architectures=("gfx942",),
                head_sizes=range(8, 257),
                features=frozenset(Feature) - {Feature.NESTED, Feature.SECOND_DERIVATIVES},
            ),
        ),
    ),
    "efficient_cuda": Known(
        "efficient_cuda",
        "cuda",
        _spec(
            "efficient_cuda",
            SDPBackend.EFFICIENT_ATTENTION,
            Capabilities(
                devices=("cuda",),
                dtypes=("float16", "float32"),
                compute_capability=(7, 0),
                features=_CUDNN | _MASKS | {Feature.MASK_GRADIENT, Feature.DROPOUT, Feature.SEQUSED_K, Feature.VARLEN},
            ),
        ),
    ),
    "cudnn": Known(
        "efficient_cuda",
        "cuda",
        _spec(
            "cudnn",
            SDPBackend.CUDNN_ATTENTION,
            Capabilities(
                devices=("cuda",),
                dtypes=_HALF,
                compute_capability=(8, 0),
                head_sizes=range(8, 257, 8),
                features=_CUDNN | _MASKS,
            ),
        ),
    ),
    **dict.fromkeys(
        ("flash_attn2", "flash_attn3", "flash_attn4", "sage_attention", "xformers", "flashinfer", "flex", "hub"),
        Known("adapters", "adapters"),
    ),
}
