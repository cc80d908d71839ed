"""Out and lse of plain calls: shapes, dtypes, head sizes, scales, and numbers that are hard to sum."""

from __future__ import annotations

from attnplug import Feature
from attnplug.testing._call import compare, run
from attnplug.testing._checks import check
from attnplug.testing._failure import failure
from attnplug.testing._subject import Subject

SHAPES = [(1, 1), (64, 128), (128, 128), (239, 1), (113, 203), (1, 256), (108, 256)]
LONG_SHAPES = [
    *((799, 3), (384, 256), (640, 128), (512, 256), (1023, 1024), (1024, 1023)),
    *((2048, 2048), (4096, 4096), (4224, 4224)),
]
HEAD_SIZES = [16, 64, 128]
ALL_HEAD_SIZES = [1, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 512]


@check(dtypes="every")
def check_values(subject: Subject) -> None:
    """Out is softmax(scale q k^T) v for short, long, odd and single lengths."""
    for queries, keys in SHAPES:
        subject.compare(subject.call(queries=queries, keys=keys, batch=1, heads=1))
    subject.compare(subject.call(batch=3, heads=5, queries=20))


@check(full=True, may_decline=True)
def check_values_of_long_sequences(subject: Subject) -> None:
    """Out stays right over thousands of queries and keys, where sums are long and tiles many."""
    for queries, keys in LONG_SHAPES:
        subject.compare(subject.call(queries=queries, keys=keys, batch=1, heads=1, head_size=subject.head_size(64)))


@check(dtypes="every")
def check_head_sizes(subject: Subject) -> None:
    """Out is right for every head size that is declared, to the ends of the range."""
    sizes = {subject.head_size(size) for size in (ALL_HEAD_SIZES if subject.full else HEAD_SIZES)}
    if subject.head_sizes is not None:
        sizes |= {min(subject.head_sizes), max(subject.head_sizes)}
    else:
        sizes |= {1, 40}
    for size in sorted(sizes):
        subject.compare(subject.call(head_size=size, queries=20, keys=36, heads=1))


@check(Feature.VALUE_HEAD_SIZE)
def check_value_head_size(subject: Subject) -> None:
    """Values may have another head size than queries and keys, larger or smaller, gradients included."""
    for size, value_size in ((32, 48), (64, 16)):
        size = subject.head_size(size)
        subject.compare(subject.call(head_size=size, value_head_size=value_size))
        if subject.gradients:
            subject.compare(subject.call(head_size=size, value_head_size=value_size, gradients=subject.gradients))


@check()
def check_batches_and_heads(subject: Subject) -> None:
    """Each sequence and each head reads its own queries, keys and values."""
    subject.compare(
        subject.call(batch=5, heads=3, queries=4, keys=7), subject.call(batch=1, heads=12, queries=9, keys=9)
    )


@check()
def check_scale(subject: Subject) -> None:
    """The scale of the call is used, whatever its size, 0 and negative numbers included."""
    subject.compare(*(subject.call(scale=scale) for scale in (1.0, 0.05, 0.0, -0.3)))
    if subject.gradients:
        subject.compare(*(subject.call(scale=scale, gradients=subject.gradients) for scale in (0.1, -0.3)))


@check(Feature.LSE, dtypes="every")
def check_lse(subject: Subject) -> None:
    """Lse is the natural logarithm of the softmax's denominator, in float32 (float64 for float64)."""
    for queries, keys in ((40, 40), (113, 70), (1, 130), (17, 1)):
        subject.compare(subject.call(queries=queries, keys=keys, lse=True))
    subject.compare(subject.call(scale=2.0, lse=True))


@check(dtypes="every")
def check_long_sums(subject: Subject) -> None:
    """Long sums of terms of one sign are accumulated in float32, over keys and, in backward, over queries."""
    subject.compare(subject.call(values="raised", queries=2, keys=4096, batch=1, heads=1))
    if subject.gradients:
        fields = {"queries": 1024, "keys": 2, "batch": 1, "heads": 1}
        for call, inputs in subject.taken([subject.call(**fields, gradients=("value",))]):
            inputs.grad_out = inputs.grad_out + 10
            compare(subject.name, call, inputs)


@check(dtypes="every")
def check_exact_selection(subject: Subject) -> None:
    """Small integers that each query selects by one large logit come through exactly, sums of ties included."""
    size = subject.head_size(32)
    for keys in (size, 2 * size, 5 * size):
        subject.compare(subject.call(queries=2 * size, keys=keys, values="selecting", scale=1.0))


@check(dtypes="every")
def check_large_values(subject: Subject) -> None:
    """Products of 40,000 do not overflow: the maximum is taken out before the exponential."""
    lse, size = subject.has(Feature.LSE), subject.head_size(32)
    # each key as often: 8 bits of keys less their mean cannot tell that two blocks of them hold equal ones otherwise
    often = subject.call(values="large", queries=70, keys=3 * size, batch=1)
    subject.compare(subject.call(values="large", lse=lse), often)
    if subject.gradients:
        call, inputs = subject.one(subject.call(values="large", gradients=subject.gradients))
        for name, gradient in run(subject.name, call, inputs).gradients.items():
            if not bool(gradient.isfinite().all()):
                raise failure(call, f"the gradient of {name} is not finite")


@check()
def check_very_negative_logits(subject: Subject) -> None:
    """Rows whose logits are all far below 0 do not underflow to 0 / 0."""
    subject.compare(subject.call(values="negative", queries=70, keys=90, lse=subject.has(Feature.LSE)))


@check()
def check_growing_logits(subject: Subject) -> None:
    """What was accumulated is rescaled whenever a later key raises the row's maximum."""
    subject.compare(subject.call(values="growing", queries=20, keys=300, lse=subject.has(Feature.LSE)))


@check()
def check_shrinking_logits(subject: Subject) -> None:
    """What was accumulated is kept when later keys lie below the row's maximum."""
    subject.compare(subject.call(values="shrinking", queries=20, keys=300, lse=subject.has(Feature.LSE)))


@check()
def check_tail_blocks(subject: Subject) -> None:
    """Lengths one below, at and one above multiples of a tile: nothing beyond the end takes part."""
    for length in (15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129):
        one = subject.call(batch=1, heads=1)
        subject.compare(one.but(queries=5, keys=length), one.but(queries=length, keys=5))
        if subject.gradients and length in (17, 63, 65):
            subject.compare(one.but(queries=length, keys=length, gradients=subject.gradients))
