"""Tells attnplug about `math_ref`, the reference implementation.

This module is read whenever implementations are listed, so it imports neither torch nor the kernel.
"""

from attnplug import Capabilities, Feature, ImplSpec, SDPBackend, hookimpl


@hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    """Return the one implementation of this distribution.

    A reference that left something out would be none, so every feature is declared, and a feature that
    is added to the list fails the conformance checks until it is written here. Nested tensors are the
    exception: `varlen_attn` says the same with plain tensors.
    """
    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        features=frozenset(Feature) - {Feature.NESTED},
    )
    return [
        ImplSpec(
            name="math_ref",
            kernel="attnplug_math_ref.impl",
            backend=SDPBackend.MATH,
            capabilities=capabilities,
            priority=-100,
        )
    ]
