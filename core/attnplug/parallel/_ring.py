"""Ring attention: each rank keeps its queries, and sees the keys and values of every other rank, a block at a time.

While a block is computed, the next one is on its way. Ring attention: Liu, Zaharia and Abbeel, "Ring Attention with
Blockwise Transformers for Near-Infinite Context", 2023; merging by lse is that of FlashAttention's blocks. Sinks are
counted once, after everything else, so no kernel needs to know of them; grouped heads travel as few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attnplug._dispatch.watched import among_watchers
from attnplug._errors import GradientError
from attnplug._registry.kernel import OfOneRank
from attnplug._run.contract import DIFFERENTIABLE, BackwardInputs, KernelCall, declares, no_lse_gradient, tensors_of
from attnplug._run.seeds import drawn_seed, seeded
from attnplug._selection.selection import current_selection
from attnplug._selection.state import thread
from attnplug._selection.watching import wished
from attnplug._types import Feature, SDPAParams
from attnplug.parallel._alike import check_alike
from attnplug.parallel._exchange import Transfer, connect, exchange, reporting
from attnplug.parallel._kernels import Source, choose, entry_of, number_of, part_backward, source_of, whole_backward
from attnplug.parallel._merge import Merged, weights
from attnplug.parallel._plan import Step, steps
from attnplug.parallel._ranges import Block, Range, size, total
from attnplug.parallel._share import Share

FEATURES = frozenset(
    {
        Feature.CAUSAL,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.SINKS_GRADIENT,
        Feature.DROPOUT,
        Feature.GQA,
        Feature.VALUE_HEAD_SIZE,
        Feature.LSE,
        Feature.LSE_GRADIENT,
        Feature.SEQUSED_K,
        Feature.VARLEN,
    }
)
"""What a ring does with a kernel that does it, or, for sinks, by itself."""


class Ring(OfOneRank):
    """A kernel, for the rest of attnplug, that computes attention over the ranks of a group.

    Its calls are those of one rank. `max_k` of a dense call is the length of the whole sequence, where that is not the
    rank's own times the number of ranks; packed sequences are described as a whole.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup | None], impl: str | None, scoped: bool = True) -> None:
        self._group, self.impl = group, impl  # a kernel may be kept longer than its group, and does not keep it
        self.scoped = scoped
        """Whether the scope around a call chooses the kernel; one that a module was bound to has led here already."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The group, which PyTorch keeps until it is destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("group: the process group of this ring was destroyed")
        return group

    @staticmethod
    def supports(params: SDPAParams) -> str | None:
        """Decline what has no meaning for a rank's part of a sequence; asked before any message."""
        if params.is_causal and not params.is_varlen and params.query.shape[2] != params.key.shape[2]:
            return (
                "a causal call over several ranks needs as many queries as keys on each, got "
                f"{params.query.shape[2]} and {params.key.shape[2]} (a cache of keys is not supported)"
            )
        return None

    def fake(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        query = params.query
        out = query.new_empty(*query.shape[:-1], params.value.shape[-1])
        lse = query.new_empty(params.lse_shape, dtype=params.lse_dtype)
        return out, lse, torch.empty(3, dtype=torch.int64, device="cpu")

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return `out`, `lse` and what backward must know: the kernel, whether it saves tensors, and the seed."""
        grad = any(tensor is not None and tensor.requires_grad for tensor in tensors_of(params)[: len(DIFFERENTIABLE)])
        with reporting(self.group), torch.no_grad():
            check_alike(self.group, "ring", params)
            call = Share.of(self.group, params)
            impl = wished(self.impl) if thread.state.watched else self.impl
            selection = current_selection(impl)
            if not self.scoped:
                selection = replace(selection, scope=None)
            decision = choose(call.examples(grad), selection, grad)
            connect(self.group, params.query.device)
            seed = drawn_seed(params.query.device) if params.dropout else 0
            run = _Run(call, _State(number_of(decision.entry), False, seed))
            if thread.state.watched:
                out, lse = among_watchers(decision, params, lambda _: run.forward(), whole=False)(params)
            else:
                out, lse = run.forward()
        return out, lse, run.state.as_tensor()

    def backward(
        self,
        params: SDPAParams,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value, no mask, and sinks; that of sinks is this rank's share."""
        with reporting(self.group):
            state = _State.of(saved)
            if grad_lse is not None and not declares(entry_of(state.number), Feature.LSE_GRADIENT):
                if bool(grad_lse.any()):  # a graph has zeros where nobody asked
                    raise GradientError(no_lse_gradient(entry_of(state.number)))  # before any message
                grad_lse = None
            return _Run(Share.of(self.group, params), state).backward(_Results(grad_out, grad_lse, out, lse))


@dataclass
class _State:
    """What backward must know of forward, as a tensor carries it."""

    number: int
    saves: bool  # whether the kernel saved tensors for backward; then its forward is run once more
    seed: int

    def as_tensor(self) -> Tensor:
        return torch.tensor([self.number, self.saves, self.seed], device="cpu")

    @classmethod
    def of(cls, tensor: Tensor) -> _State:
        number, saves, seed = tensor.tolist()
        return cls(number, bool(saves), seed)


class _Results(NamedTuple):
    """What backward is given: the results of a call on this rank, and their gradients."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor

    def rows(self, call: Share, part: Range) -> _Results:
        """Return those of some rows, contiguous."""
        grad_out, out = (call.rows(tensor, part).contiguous() for tensor in (self.grad_out, self.out))
        rows = slice(*part)
        grad_lse = None if self.grad_lse is None else self.grad_lse[..., rows].contiguous()
        return _Results(grad_out, grad_lse, out, self.lse[..., rows].contiguous())


class _Run:
    """Forward or backward of a call on this rank."""

    def __init__(self, call: Share, state: _State) -> None:
        self.call, self.state = call, state
        self.params, self.group = call.params, call.group
        self.entry = entry_of(state.number)
        self.steps = steps(call.layout, call.rank)
        self.wide = call.params.lse_dtype
        self.wanted = tuple(tensor.requires_grad for tensor in (self.params.query, self.params.key, self.params.value))

    def forward(self) -> tuple[Tensor, Tensor]:
        call, params = self.call, self.params
        merged = Merged(params.lse_shape, params.value.shape[-1], self.wide)
        for step, key, value in self._arriving():
            for number, block in enumerate(step.blocks):
                tensors, of_block = self._block(step, block, key, value)
                with self._seeded(step, number):
                    out, lse, *saved = of_block.forward(tensors)
                self.state.saves |= any(tensor is not None for tensor in saved)
                merged.add(*block.queries, _by_heads(call, out), lse)
        out, lse = merged.result(params.query, params.sinks)
        return _by_heads(call, out).to(params.query.dtype).contiguous(), lse

    def backward(self, results: _Results) -> tuple[Tensor | None, ...]:
        call, params = self.call, self.params
        wanted = self.wanted
        grads = [torch.zeros_like(tensor, dtype=self.wide) for tensor in (params.query, params.key, params.value)]
        returning: _Returning | None = None
        for step, key, value in self._arriving() if any(wanted) else ():
            own = step.source == call.rank
            of_keys = grads[1:] if own else self._sums(step, key, value)
            for number, block in enumerate(step.blocks):
                found = self._block_backward(step, number, block, key, value, results)
                if not of_keys:  # the gradients of one block are those of the step
                    of_keys = [
                        torch.zeros_like(tensor) if part is None else part
                        for tensor, part in zip((key, value), found[1:], strict=True)
                    ]
                    found = (found[0], None, None)
                places = (block.queries, block.keys, block.keys)
                for whole, part, rows in zip((grads[0], *of_keys), found, places, strict=True):
                    if part is not None:
                        call.rows(whole, rows).add_(part)
            if returning is not None:
                returning.add_to(grads[1:])
            if not own and (wanted[1] or wanted[2]):
                returning = self._send_back(step, of_keys)
        if returning is not None:
            returning.add_to(grads[1:])
        rounded = [
            grad.to(tensor.dtype) if want else None
            for grad, tensor, want in zip(grads, (params.query, params.key, params.value), wanted, strict=True)
        ]
        return (*rounded, None, self._sinks_gradient(results))

    def _arriving(self) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Yield each step with its keys and values, while those of the next one are on their way."""
        params, following = self.params, self._fetch(1)
        yield self.steps[0], params.key, params.value
        for position in range(1, len(self.steps)):
            transfer, (key, value) = following
            transfer.wait()
            following = self._fetch(position + 1)
            yield self.steps[position], key, value

    def _fetch(self, position: int) -> Any:
        """Start to send and receive the keys and values of a step, in one message each."""
        if position >= len(self.steps):
            return None
        step, tensors = self.steps[position], (self.params.key, self.params.value)
        sent = _pack([[self.call.rows(tensor, part) for part in step.given] for tensor in tensors], self.call.dim)
        received, views = self._empty(total(step.taken))
        return exchange(self.group, [(step.target, sent)], [(step.source, received)]), views

    def _sums(self, step: Step, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return where gradients of several blocks are added up; nothing where there is one of all that was taken."""
        if len(step.blocks) == 1 and size(step.blocks[0].keys) == total(step.taken):
            return []
        return [torch.zeros_like(tensor, dtype=self.wide) for tensor in (key, value)]

    def _send_back(self, step: Step, of_keys: Sequence[Tensor]) -> _Returning:
        """Start to send gradients back to the owner of the keys, in the dtype that the kernel rounded them to."""
        dtype = self.params.key.dtype
        sent = _pack([[tensor.to(dtype)] if total(step.taken) else [] for tensor in of_keys], self.call.dim)
        received, views = self._empty(total(step.given))
        transfer = exchange(self.group, [(step.source, sent)], [(step.target, received)])
        return _Returning(self.call, transfer, step.given, views)

    def _empty(self, rows: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return a buffer for so many rows of keys and values, and what of it is which."""
        shapes = [list(tensor.shape) for tensor in (self.params.key, self.params.value)]
        for shape in shapes:
            shape[self.call.dim] = rows
        first, second = (torch.Size(shape).numel() for shape in shapes)
        flat = self.params.key.new_empty(first + second)
        return flat, (flat[:first].view(shapes[0]), flat[first:].view(shapes[1]))

    def _block(
        self, step: Step, block: Block, key: Tensor, value: Tensor
    ) -> tuple[tuple[Tensor | None, ...], KernelCall]:
        """Return a block's tensors and call."""
        call = self.call
        used = None
        if self.params.seqused_k is not None:
            used = self._used(step, block)
        params = call.block(
            block,
            call.rows(self.params.query, block.queries),
            call.rows(key, block.keys),
            call.rows(value, block.keys),
            used,
        )
        return tensors_of(params), KernelCall.of(self.entry, params)

    def _used(self, step: Step, block: Block) -> Tensor:
        """Return how many keys of a block exist: positions ascend with rows, so that they are the first of it."""
        used = torch.zeros_like(self.params.seqused_k)
        for start, stop in self.call.layout.ranges(step.source, of_keys=True):
            used = used + (self.params.seqused_k - start).clamp(0, stop - start)
        before = 0  # rows of the source, and not of what was taken from it
        first, position = block.keys[0], 0
        for start, stop in step.taken:
            if position <= first < position + stop - start:
                before = start + first - position
            position += stop - start
        return (used - before).clamp(0, size(block.keys)).to(torch.int32)

    def _block_backward(
        self, step: Step, number: int, block: Block, key: Tensor, value: Tensor, results: _Results
    ) -> tuple[Tensor | None, ...]:
        call = self.call
        tensors, of_block = self._block(step, block, key, value)
        grad_out, grad_lse, out, lse = results = results.rows(call, block.queries)
        with self._seeded(step, number):
            if source_of(self.entry, of_block.params(tensors)) is Source.WHOLE:
                saved: Sequence[Tensor | None] = of_block.forward(tensors)[2:] if self.state.saves else ()
                return whole_backward(of_block, BackwardInputs(tensors, self.wanted, *results, saved))

            def weigh(part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
                """With `out = sum(w out_b)` and `w = exp(lse_b - lse)`, return the gradients of `out_b` and `lse_b`."""
                weight = weights(part_lse, lse)
                along = ((part_out - out).to(self.wide) * grad_out).sum(-1)
                along = (along.T if call.is_varlen else along) + (0.0 if grad_lse is None else grad_lse)
                by_row = weight.T if call.is_varlen else weight
                return (grad_out * by_row.unsqueeze(-1)).to(grad_out.dtype), (weight * along).contiguous()

            return part_backward(of_block, tensors, self.wanted, weigh)

    def _seeded(self, step: Step, number: int) -> AbstractContextManager[None]:
        """Draw what dropout draws in this block, and in no other."""
        if not self.params.dropout:
            return nullcontext()
        return seeded(self.params.query.device, self.state.seed, self.call.rank, step.source, number)

    def _sinks_gradient(self, results: _Results) -> Tensor | None:
        """Return this rank's share: `sum(P (grad_lse - grad_out * out))`, `P` what the sink has of the softmax."""
        sinks = self.params.sinks
        if sinks is None or not sinks.requires_grad:
            return None
        grad_out, grad_lse, out, lse = results
        along = -(grad_out.to(self.wide) * out).sum(-1)
        along = (along.T if self.call.is_varlen else along) + (0.0 if grad_lse is None else grad_lse)
        probability = torch.exp(sinks.to(self.wide)[:, None] - lse)
        return (probability * along).sum([dim for dim in range(lse.dim()) if dim != lse.dim() - 2]).to(sinks.dtype)


@dataclass
class _Returning:
    """Gradients of this rank's keys and values, on their way from where they were made."""

    call: Share
    transfer: Transfer
    given: tuple[Range, ...]
    views: tuple[Tensor, Tensor]

    def add_to(self, grads: Sequence[Tensor]) -> None:
        self.transfer.wait()
        for whole, arrived in zip(grads, self.views, strict=True):
            position = 0
            for part in self.given:
                self.call.rows(whole, part).add_(self.call.rows(arrived, (position, position + size(part))))
                position += size(part)


def _pack(tensors: Sequence[Sequence[Tensor]], dim: int) -> Tensor:
    """Return one flat tensor of these, each of which is in pieces along a dimension."""
    flat = [torch.cat(list(pieces), dim).reshape(-1) for pieces in tensors if pieces]
    return torch.cat(flat) if flat else torch.empty(0)


def _by_heads(call: Share, rows: Tensor) -> Tensor:
    """Return rows `(..., Hq, rows, n)`, of packed tokens too; and the other way round."""
    return rows.transpose(0, 1) if call.is_varlen else rows
