"""Which tiles of keys the rows of a tile of queries see."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnplug_flash_triton.hopper.device import WARPGROUP
from attnplug_flash_triton.hopper.forward.records import Rows


@gluon.jit
def rows_of(tile, call, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Return the `Rows` of a tile that warpgroup number `CONSUMER` has, and (begin, end) of the keys of all warpgroups.

    Those are tiles of keys, too. The program loads them all: a warpgroup passes over those that only others see.
    """
    low, high = sides(tile, call, config)
    begin_all, end_all = span(tile.row, gl.minimum(tile.row + config.M, tile.len_q), 0, tile.len_k, low, high, config)
    row = tile.row + CONSUMER * WARPGROUP
    begin, end = span(row, row + WARPGROUP, begin_all, tile.len_k, low, high, config)
    end = gl.minimum(end, end_all)
    begin = gl.minimum(begin, end - 1)
    return Rows(row, tile.len_k, low, high, begin, end), begin_all, end_all


@gluon.jit
def sides(tile, call, config: gl.constexpr):
    """Return (low, high): query i sees the keys from i + low to i + high."""
    offset = 0
    if config.LOWER_RIGHT:
        offset = tile.len_k - tile.len_q
    return offset - call.left, offset + call.right


@gluon.jit
def span(first, end, least, len_k, low, high, config: gl.constexpr):
    """Return (begin, end) of the tiles of keys that rows `first` to `end - 1` see, from `least` on; at least one."""
    end_key = len_k
    if config.HAS_HIGH:
        end_key = gl.maximum(gl.minimum(len_k, end + high), 0)
    end_tile = gl.maximum((end_key + config.BLOCK_N - 1) // config.BLOCK_N, least + 1)
    begin = least
    if config.HAS_LOW:
        begin = gl.minimum(gl.maximum(gl.maximum(first + low, 0) // config.BLOCK_N, least), end_tile - 1)
    return begin, end_tile


@gluon.jit
def whole(rows, config: gl.constexpr):
    """Return (begin, end) of the tiles, without the last one, of which `rows` see every key."""
    whole_end = rows.end - 1
    if config.HAS_HIGH:
        seen = gl.maximum(gl.minimum(rows.len_k, rows.row + rows.high + 1), 0)
        whole_end = gl.maximum(gl.minimum(whole_end, seen // config.BLOCK_N), rows.begin)
    whole_begin = rows.begin
    if config.HAS_LOW:
        unseen = gl.maximum(rows.row + WARPGROUP - 1 + rows.low, 0)
        whole_begin = (unseen + config.BLOCK_N - 1) // config.BLOCK_N
        whole_begin = gl.maximum(gl.minimum(whole_begin, whole_end), rows.begin)
    return whole_begin, whole_end
