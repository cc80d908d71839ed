"""From products to probabilities, and the form in which probabilities go from one round to the next."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnplug_flash_triton.hopper.device import (
    LN2,
    LOG2E,
    after_wait,
    as_operand,
    exp2,
    hidden_above,
    hidden_behind,
    hidden_below,
    multiplied_where_needed,
    packed,
    reciprocal,
    softcapped,
)

GROWTH = gl.constexpr(8.0)
"""By how much, in powers of two, a logit may exceed what is subtracted from it before that is raised (the idea is
FlashAttention-4's). Exponentials are then larger than they need be, up to 2**8, and no less exact, and most rounds need
not rescale the output."""
PARTS = gl.constexpr(4)
"""Of a row's columns, of which a thread has pairs: see `_maxima`."""
AT_END = gl.constexpr(2)
"""For MASKED: all that hides keys is the end of the sequence."""
SHARED = gl.constexpr(2)
"""For SOFTCAP: four elements share a reciprocal."""


@gluon.jit
def softmax(s, top, total, rows, column, outputs, FIRST: gl.constexpr, MASKED: gl.constexpr, config: gl.constexpr):
    """Return unscaled probabilities of the products `s`, the rows' new maxima and sums, and what earlier ones fade by.

    Maxima are those of products; sums are kept apart for the threads that share a row, and are added up at the end.
    """
    scale = outputs.scale
    if config.NEGATE:
        s = -s
    if config.SOFTCAP == SHARED:
        s = softcapped(s * outputs.inner_scale)
    elif config.SOFTCAP:  # tanh; that it has no relative precision near 0 is no loss in a logit
        s = 1.0 - 2.0 * reciprocal(exp2(s * outputs.inner_scale) + 1.0)
    if MASKED == AT_END:
        j = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = hidden_behind(s, j - rows.len_k + 1)
    elif MASKED:
        s = _masked(s, rows, column, config)
    higher = _maxima(s)
    if not FIRST:
        higher = gl.maximum(top, higher)
        higher = gl.where((higher - top) * scale > GROWTH, higher, top)
    shift = higher
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        shift = gl.where(higher == float("-inf"), 0.0, higher)
    p = exp2(s * scale - (shift * scale)[:, None])
    if FIRST:
        fade = higher  # of nothing
        total = _part_sums(p)
    else:
        fade = exp2((top - shift) * scale)
        threads: gl.constexpr = gl.SliceLayout(1, total.type.layout)
        total = total * gl.convert_layout(fade, threads, assert_trivial=True)[:, None] + _part_sums(p)
    return p, higher, total, fade


@gluon.jit
def _masked(s, rows, column, config: gl.constexpr):
    """Return `s` with -inf where a row does not see a key; the first key is `column`."""
    layout: gl.constexpr = s.type.layout
    j = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    if config.HAS_LOW or config.HAS_HIGH:
        i = rows.row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, layout))
    if config.HAS_HIGH:
        s = hidden_above(s, j[None, :], gl.minimum(i + rows.high, rows.len_k - 1)[:, None])
    else:
        s = hidden_above(s, j[None, :], rows.len_k - 1)
    if config.HAS_LOW:
        s = hidden_below(s, j[None, :], (i + rows.low)[:, None])
    return s


@gluon.jit
def _maxima(s):
    """Return the maximum of each row: eight parts of what one thread has of it, then these; then threads.

    As one chain of 32, each of whose maxima waits for the one before, it took a fifth of a round.
    """
    ROWS: gl.constexpr = s.shape[0]
    COLUMNS: gl.constexpr = s.shape[1]
    parts = gl.reshape(s, [ROWS, PARTS, COLUMNS // (8 * PARTS), 4, 2])
    highest = gl.max(gl.max(gl.max(gl.max(parts, 2), 3), 1), 1)
    return gl.convert_layout(highest, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.jit
def _part_sums(p):
    """Sum over those columns of each row that one thread has: four parts of a row."""
    ROWS: gl.constexpr = p.shape[0]
    COLUMNS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def weights(p, o, in_order, dtype: gl.constexpr, config: gl.constexpr):
    """Return probabilities in the form in which they go from one round to the next; see `after_wait`."""
    if p.shape[1] == 2 * o.shape[1]:  # as many words as there are elements of the output
        return after_wait(packed(p, dtype), o, in_order)
    elif config.WORDS:
        return packed(p, dtype)
    else:
        return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o.type.layout, 2), assert_trivial=True)


@gluon.jit
def operand_of(p, o, dtype: gl.constexpr):
    """Return what `weights` returned as the left operand of a product."""
    if p.dtype == gl.int32:
        return as_operand(p, dtype, gl.DotOperandLayout(0, o.type.layout, 2))
    else:
        return p


@gluon.jit
def faded(o, fade):
    """Return the output so far, multiplied by what it fades by as maxima grow."""
    fade = gl.convert_layout(fade, gl.SliceLayout(1, o.type.layout), assert_trivial=True)
    return multiplied_where_needed(o, fade)


@gluon.jit
def finished(top, total, head, outputs, config: gl.constexpr):
    """Return what the output is multiplied by, and lse, of rows whose products have the maximum `top`."""
    total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
    if config.SOFTCAP == SHARED:
        top += 0.5
    top = top * outputs.scale
    if outputs.sinks is not None:
        sink = gl.cast(gl.load(outputs.sinks + head), gl.float32) * LOG2E
        highest = gl.maximum(top, sink)
        shift = gl.where(highest == float("-inf"), 0.0, highest)
        fade = exp2(top - shift)
        total = total * fade + exp2(sink - shift)
        share = gl.where(total == 0.0, 0.0, fade / total)
        top = highest
    else:
        share = gl.where(total == 0.0, 0.0, 1.0 / total)
    return share, (top + gl.log2(total)) * LN2
