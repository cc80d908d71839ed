"""The implementations that come with the core: PyTorch's own function, two of its leaf kernels, and the
providers that its registry has built in.

A plugin like any other: found by its dotted name, asked through the same hook, held to attnplug's public names (and
`_tracing`, which a plugin could write with PyTorch's). This module is light, as theirs are: the kernels beside it
import torch, it does not. `FA3` and `FA4` alone have their kernels elsewhere: they are what
`attnplug._control.providers` makes of every provider of PyTorch's registry.
"""

from __future__ import annotations

from dataclasses import replace

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend, hookimpl

_TORCH = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    features={
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.MASK_GRADIENT,
        Feature.CAUSAL,
        Feature.UPPER_LEFT,
        Feature.DROPOUT,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.NESTED,
    },
)
_MATH = Capabilities(
    devices=("cpu", "cuda"),
    dtypes=_TORCH.dtypes,
    features=frozenset(_TORCH.features) - {Feature.NESTED} | {Feature.SECOND_DERIVATIVES},
)
_FLASH_CPU = Capabilities(
    devices=("cpu",),
    dtypes=_TORCH.dtypes,
    features={
        Feature.BOOLEAN_MASK,
        Feature.ADDITIVE_MASK,
        Feature.CAUSAL,
        Feature.UPPER_LEFT,
        Feature.GQA,
        Feature.LSE,
    },
)
_FLASH_CUDA = Capabilities(
    devices=("cuda",),
    dtypes=("float16", "bfloat16"),
    compute_capability=(8, 0),
    head_sizes=range(8, 257, 8),
    features={Feature.CAUSAL, Feature.LOWER_RIGHT, Feature.DROPOUT, Feature.GQA, Feature.LSE},
)
# FlashAttention 3 and 4 in the place of the operator: `torch/nn/attention/_fa3.py` and `_fa4.py`.
_HOPPER = replace(
    _FLASH_CUDA,
    compute_capability=(9, 0),
    features=frozenset(_FLASH_CUDA.features) - {Feature.DROPOUT},
    alternatives=(),
)

_SPECS = [
    ImplSpec(
        name="torch",
        kernel="attnplug.builtin.torch_sdpa",
        backend=None,
        capabilities=_TORCH,
        priority=0,
    ),
    ImplSpec(
        name="aten_flash",
        kernel="attnplug.builtin.aten_flash",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=_FLASH_CPU | _FLASH_CUDA,
        priority=0,
    ),
    ImplSpec(
        name="FA3",
        kernel="attnplug._control.providers:FA3",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=_HOPPER,
        priority=-10,
        requires=("flash_attn_interface",),  # built from source: the wheels on PyPI are forward only
        install="pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
    ImplSpec(
        name="FA4",
        kernel="attnplug._control.providers:FA4",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=_HOPPER,
        priority=-10,
        requires=("flash_attn.cute",),
        install="pip install --pre flash-attn-4",
    ),
    ImplSpec(
        name="aten_math",
        kernel="attnplug.builtin.aten_math",
        backend=SDPBackend.MATH,
        capabilities=_MATH,
        priority=-50,
    ),
]


@hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    """Return the implementations that need nothing but PyTorch."""
    return _SPECS
