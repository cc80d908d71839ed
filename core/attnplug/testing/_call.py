"""One call that can be run: whatever fails can be written as one line of Python and run again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug._accuracy import Outcome
from attnplug._arguments import expect
from attnplug._control.registration import check_name
from attnplug._types import CausalVariant
from attnplug.testing import _inputs
from attnplug.testing._compare import assert_outcome, expected, is_quantized, revealed
from attnplug.testing._failure import failing
from attnplug.testing._fields import Fields
from attnplug.testing._inputs import Inputs


@dataclass(frozen=True, kw_only=True, repr=False)
class Call(Fields):
    """A call with random inputs, the same for the same fields.

    Attributes:
        queries, keys: lengths; with `lengths_q` and `lengths_k`, one for each sequence, a call of `varlen_attn`.
        mask: `boolean` or `additive`; with `blind` rows that see nothing; `-inf` entries in an additive one.
        mask_dims: its dimensions, each a letter of `bhqk`, or 1 where it broadcasts.
        alibi: `h` for slopes `(Hq,)`, `bh` for `(B, Hq)`.
        used: `seqused_k`.
        page_size: keys and values in shuffled pages of so many.
        gradients: the arguments whose gradients are wanted; `lse_gradient` puts lse in the loss.
        values: what the numbers are like: `normal`, `large`, `growing`, `rising`, `shrinking`, `negative`, `raised`,
            `selecting` or `identity`.
        layout, mask_layout: how query, key and value, and the mask, lie in memory: `contiguous`, `transposed`,
            `strided`, `column-major`, `expanded`, `offset`, `misaligned`, `guarded` or `framed`.
        numbers_layout: the same of all other tensors: `cu_seq_q`, `cu_seq_k`, `seqused_k`, `block_table`, `sinks` and
            `alibi_slopes`. `expanded` gives each sequence or head what the first one has.
        poison: NaN in all memory that the call must not read.

    Examples:
        >>> from attnplug.testing import Call
        >>> Call(queries=4, keys=6, heads=2).check("torch")
    """

    def but(self, **changes: Any) -> Call:
        """Return this call with some fields changed."""
        return replace(self, **changes)

    def make(self) -> Inputs:
        """Make the tensors."""
        return _inputs.make(self)

    def run(self, impl: str, inputs: Inputs | None = None) -> Outcome:
        """Run the call with the implementation `impl`, backward too if `gradients` are wanted."""
        inputs = self.make() if inputs is None else inputs
        arguments, leaves = self.with_leaves(inputs)
        function = attnplug.varlen_attn if self.is_varlen else attnplug.scaled_dot_product_attention
        with torch.set_grad_enabled(bool(leaves)):
            returned = function(**arguments, impl=impl)
            out, lse = returned if self.lse else (returned, None)
            return Outcome(out.detach(), None if lse is None else lse.detach(), self.backward(inputs, out, lse, leaves))

    def with_leaves(self, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the arguments, those whose gradients are wanted as leaves of a graph; and these leaves."""
        arguments = expect("inputs", inputs, Inputs, "what make() returns").arguments
        leaves = {name: arguments[name].detach().requires_grad_() for name in self.gradients}
        return {**arguments, **leaves}, leaves

    def backward(self, inputs: Inputs, out: Tensor, lse: Tensor | None, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of `leaves`, given the call's results."""
        if not leaves:
            return {}
        outputs, grads = [out], [inputs.grad_out.to(out.dtype)]
        if self.lse_gradient:
            assert lse is not None
            outputs.append(lse)
            grads.append(inputs.grad_lse.to(lse.dtype))
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }

    def params(self, inputs: Inputs) -> attnplug.SDPAParams:
        """Return the call as the record that kernels and selection read; gradients wanted are marked in it."""
        given = dict(self.with_leaves(inputs)[0])
        given["dropout"] = given.pop("dropout_p")
        if self.is_varlen:
            given["causal_variant"] = CausalVariant.LOWER_RIGHT
        return attnplug.SDPAParams(**given)

    def check(self, impl: str) -> None:
        """Run the call with `impl` and compare everything that it returns.

        Raises:
            CheckFailure: something is further from the formula than the contract allows.
            TypeError, ValueError: a field of the call, or the name of the implementation, is wrong.
        """
        check_name(impl, "impl")
        compare(impl, self)


def run(impl: str, call: Call, inputs: Inputs) -> Outcome:
    """Run a call; whatever the implementation raises is a failure."""
    with failing(call, "raised "):
        return call.run(impl, inputs)


def compare(impl: str, call: Call, inputs: Inputs | None = None, outcome: Outcome | None = None) -> None:
    """Run a call, unless its `outcome` is given, and hold all that it returns against the formulas.

    Raises:
        CheckFailure: something is further from the formula than the contract allows.
    """
    inputs = call.make() if inputs is None else inputs
    if outcome is None:
        torch.manual_seed(call.seed)  # of dropout
        outcome = run(impl, call, inputs)
    right = expected(call, inputs, revealed(call, outcome.out))
    assert_outcome(call, inputs, right, outcome, is_quantized(impl))
