"""What `torch.utils.flop_counter.FlopCounterMode` counts for an opaque kernel: what it counts for PyTorch's own.

The formulas are PyTorch's: all products of a call, whatever its mask leaves out; backward makes the scores once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnplug._types import SDPAParams


def count_flops(operator: Any, backward: Any, call: Callable[[tuple[Any, ...]], SDPAParams]) -> None:
    """Register the formulas of an operator and of its backward, also with counters that are active.

    Args:
        operator: the packet of the operator.
        backward: that of its backward, which has seven arguments more, at first.
        call: returns the call that the operator's arguments describe.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    def of_forward(*arguments: Any, out_val: Any = None) -> int:
        params = call(arguments)
        return 2 * _scores(params) * (params.query.shape[-1] + params.value.shape[-1])

    def of_backward(*arguments: Any, out_val: Any = None) -> int:
        params = call(arguments[7:])
        return 2 * _scores(params) * (3 * params.query.shape[-1] + 2 * params.value.shape[-1])

    formulas = {operator: of_forward, backward: of_backward}
    flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry.update(formulas)


def _scores(params: SDPAParams) -> int:
    """Return how many pairs of a query and a key a call has, in all its heads."""
    if not params.is_varlen:
        batch, heads, queries, _ = params.query.shape
        return batch * heads * queries * params.key.shape[-2]
    assert params.cu_seq_q is not None
    pairs = params.cu_seq_q.diff().long() * _lengths_of_keys(params).long()
    return params.query.shape[1] * int(pairs.sum())


def _lengths_of_keys(params: SDPAParams) -> Tensor:
    if params.seqused_k is not None:
        return params.seqused_k
    assert params.cu_seq_k is not None
    return params.cu_seq_k.diff()
