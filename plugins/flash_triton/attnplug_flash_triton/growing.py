"""Forward of few queries over a number of keys that grows, as at each step of decoding.

Of its plan a step changes some integers: how many keys there are, the strides of a cache that was copied, and those of
a table that got another page. So there is one plan for all lengths that are split among as many programs, and that the
same compiled kernel reads; another length is filled in. What is launched, and so each bit of the result, is what a plan
made for that length launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import gcd

from attnplug import SDPAParams
from attnplug_flash_triton import config, launches
from attnplug_flash_triton.forward import forward_kernel
from attnplug_flash_triton.plans import INT32, Plan, is_far
from attnplug_flash_triton.problem import (
    LONGEST,
    Form,
    Machine,
    is_dense,
    read,
    row_dim,
    sections,
    splits,
    strides_of_keys,
)

PLACES = [
    forward_kernel.arg_names.index(name)
    for name in ("k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "num_k", "section", "table_batch")
]
"""What of the kernel's arguments depends on the keys."""


def can_grow(params: SDPAParams) -> bool:
    """Whether only the integers of a call's plan depend on its number of keys.

    A mask has as many columns. With few rows the plain kernels run on every architecture.
    """
    packed = params.is_varlen
    queries, heads_of_keys = params.max_q if packed else params.query.shape[2], params.key.shape[-2 if packed else 1]
    return params.attn_mask is None and int(queries) * (params.query.shape[1] // heads_of_keys) <= config.FEW


class Growing:
    """The plans of calls that differ in nothing but how many keys they have, and how these lie in memory.

    Args:
        params: one of them, for which `can_grow` holds. It is not kept.
        machine: where they run.
    """

    def __init__(self, params: SDPAParams, machine: Machine) -> None:
        problem = read(params, machine)
        self.grid = launches.grid_of(problem)
        self.programs = self.grid.programs
        self.processors, self.bytes_of_key = machine.processors, problem.bytes_of_key
        self.packed, self.paged, self.rows = params.is_varlen, params.block_table is not None, row_dim(params)
        self.unit = 16 // params.query.element_size()
        query = Form.dense(params.query, self.rows)
        self.is_aligned = all(
            step % self.unit == 0 for step, size in zip(query.stride[:-1], query.shape[:-1], strict=True) if size > 1
        )
        self.plans: dict[Hashable, Plan] = {}

    def plan(self, params: SDPAParams, make: Callable[[], Plan]) -> Plan:
        """Return the plan of one call: one for another length with this one filled in, or a new one."""
        found = self._numbers(params)
        if found is None:
            return make()
        kind, numbers = found
        known = self.plans.get(kind)
        plan = make() if known is None else known.with_arguments(PLACES, numbers)
        if known is None or not known.is_kept:  # whose call failed, or has not ended yet
            self.plans[kind] = plan
        return plan

    def _numbers(self, params: SDPAParams) -> tuple[Hashable, tuple[int, ...]] | None:
        """Return which plan a call has, and what is to be filled in; None if it must have one of its own."""
        key, value, table, rows = params.key, params.value, params.block_table, self.rows
        keys, values = Form(key.shape, key.stride()), Form(value.shape, value.stride())
        length = int(params.max_k) if self.packed else keys.shape[2]
        if length >= LONGEST or not (is_dense(*keys, rows) and is_dense(*values, rows)):
            return None
        steps = strides_of_keys(keys, values, self.packed, self.paged)
        of_table, of_page = (0, 1) if table is None else table.stride()
        if max(*steps, of_table) >= INT32 or of_page != 1:
            return None
        unit = self.unit if self.is_aligned and gcd(*steps) % self.unit == 0 else 1
        grid = self.grid
        parts = splits(self.processors, self.programs, length, grid.tiles.block_n)
        section = sections(length * self.bytes_of_key, grid.columns) * parts
        far = is_far(key), is_far(value)
        return (parts, unit, far), (*[step // unit for step in steps], length, section, of_table)
