"""Wrong sequences: packed, partly used, paged."""

from __future__ import annotations

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams
from mutants import wrong
from mutants.kernel import Kernel


@wrong("check_varlen")
class NextSequenceLeaks(Kernel):
    """Reads one key of the following sequence, where there is one."""

    def used(self, params: SDPAParams, b: int) -> int:
        more = params.cu_seq_k is not None and params.block_table is None and b + 1 < self.batch(params)
        return super().used(params, b) + int(more and params.seqused_k is None)


@wrong("check_varlen")
class LengthsOfTheFirstSequence(Kernel):
    """Takes the first sequence's number of keys, or less, for all."""

    def used(self, params: SDPAParams, b: int) -> int:
        first = super().used(params, 0)
        return super().used(params, b) if params.cu_seq_k is None else min(first, super().used(params, b))


@wrong("check_varlen_causal", "check_varlen_window")
class PackedUpperLeft(Kernel):
    """Aligns packed sequences to the upper left."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        return 0 if params.cu_seq_q is not None else super().offset(params, b, queries, keys)


@wrong("check_varlen_causal")
class PackedByTheLongest(Kernel):
    """Takes the longest lengths, not the sequence's own, for the offset."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        if params.cu_seq_q is None:
            return super().offset(params, b, queries, keys)
        return params.max_k - params.max_q


@wrong("check_tokens_of_no_sequence")
class LastSequenceToTheEnd(Kernel):
    """Takes all keys behind the start of the last sequence for its own."""

    def used(self, params: SDPAParams, b: int) -> int:
        if params.cu_seq_k is None or params.block_table is not None or params.seqused_k is not None:
            return super().used(params, b)
        last = b + 1 == self.batch(params)
        return params.key.shape[0] - int(params.cu_seq_k[b]) if last else super().used(params, b)


@wrong("check_varlen_empty_sequences")
class EmptySequencesAreNan(Kernel):
    """Divides by the sum of no weights in a sequence without keys."""

    def store(self, params: SDPAParams, b: int, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        if params.cu_seq_q is not None and self.used(params, b) == 0:
            part = part / 0
        super().store(params, b, out, lse, part, part_lse)


@wrong("check_varlen_one_token")
class SingleQueriesSeeOneKey(Kernel):
    """Takes a path for decoding whenever a sequence has one query, which forgets the last key."""

    def used(self, params: SDPAParams, b: int) -> int:
        count = super().used(params, b)
        if params.cu_seq_q is None:
            return count
        start, stop = self.rows(params, b)
        return max(1, count - 1) if stop - start == 1 and count else count


@wrong("check_varlen_gradients")
class KeyGradientsShifted(Kernel):
    """Writes the gradients of packed keys one token too far."""

    def joined(self, params: SDPAParams, name: str, parts: list[Tensor]) -> Tensor:
        found = super().joined(params, name, parts)
        return found.roll(1, 0) if params.cu_seq_q is not None and name == "key" else found


@wrong("check_seqused_k")
class AllKeysExist(Kernel):
    """Ignores seqused_k in dense calls."""

    def used(self, params: SDPAParams, b: int) -> int:
        return params.key.shape[2] if params.cu_seq_q is None else super().used(params, b)


@wrong("check_seqused_k")
class OneUnusedKey(Kernel):
    """Uses one key too many: <= for <."""

    def used(self, params: SDPAParams, b: int) -> int:
        count = super().used(params, b)
        if params.cu_seq_q is not None or params.seqused_k is None:
            return count
        return min(count + 1, params.key.shape[2])


@wrong("check_seqused_k_lower_right")
class OffsetOfAllKeys(Kernel):
    """Aligns to the last key, not to the last used one."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        if params.causal_variant == CausalVariant.LOWER_RIGHT and params.cu_seq_q is None:
            return params.key.shape[2] - queries
        return super().offset(params, b, queries, keys)


@wrong("check_varlen_seqused_k", "check_paged_seqused_k")
class PackedKeysAllExist(Kernel):
    """Ignores seqused_k in variable-length calls."""

    def used(self, params: SDPAParams, b: int) -> int:
        if params.cu_seq_k is not None:
            return int(params.cu_seq_k[b + 1] - params.cu_seq_k[b])
        return super().used(params, b)


@wrong("check_unused_keys_are_not_felt")
class UnusedKeysTimesZero(Kernel):
    """Reads unused values and multiplies them by 0, which NaN survives."""

    def tensors(self, params: SDPAParams, b: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().tensors(params, b)
        if params.seqused_k is None or params.cu_seq_q is not None:
            return query, key, value
        unused = params.value[b, :, self.used(params, b) :]
        return query, key, value + (unused * 0).sum(-2, keepdim=True)


@wrong("check_paged")
class PagesInOrder(Kernel):
    """Reads the pages in the order of memory."""

    def key_places(self, params: SDPAParams, b: int) -> Tensor:
        if params.block_table is None:
            return super().key_places(params, b)
        first = params.block_table.shape[1] * params.key.shape[1] * b
        return torch.arange(first, first + self.used(params, b))


@wrong("check_paged")
class TableOfTheFirstSequence(Kernel):
    """Forgets the stride of the block table."""

    def key_places(self, params: SDPAParams, b: int) -> Tensor:
        if params.block_table is None:
            return super().key_places(params, b)
        position = torch.arange(self.used(params, b))
        page_size = params.key.shape[1]
        return params.block_table[0].long()[position // page_size] * page_size + position % page_size


@wrong("check_paged", "check_unused_pages_are_not_felt")
class LastPageIsFull(Kernel):
    """Reads the last page to its end."""

    def used(self, params: SDPAParams, b: int) -> int:
        count = super().used(params, b)
        return count if params.block_table is None else -(-count // params.key.shape[1]) * params.key.shape[1]


@wrong("check_paged_gradients")
class PageGradientsInOrder(Kernel):
    """Writes the gradients of pages in the order of the sequences."""

    def joined(self, params: SDPAParams, name: str, parts: list[Tensor]) -> Tensor:
        found = super().joined(params, name, parts)
        return found.roll(1, 0) if params.block_table is not None and name != "query" else found


@wrong("check_nested_tensors")
class NestedValuesOfTheFirstLength(Kernel):
    """Reads a nested tensor's values from the start of its memory, as if all sequences had the first's length."""

    def of_nested(self, params: SDPAParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().of_nested(params, query, key, params.value.unbind()[0][None, :, :1].expand_as(value))
