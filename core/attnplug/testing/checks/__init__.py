"""Every promise, a module for each subject; a failure of an early one often explains those of later ones."""

SIMPLEST_FIRST = (
    "loading",
    "values",
    "heads",
    "causal",
    "masks",
    "logits",
    "gradients",
    "varlen",
    "nested",
    "dropout",
    "memory",
    "running",
    "compiling",
    "pairs",
)
