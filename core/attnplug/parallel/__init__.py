"""Attention over a sequence that is split among several ranks.

Results and gradients are those of the call on one rank. Imported on first access, because
a program on one GPU does not need `torch.distributed`.
"""

from attnplug.parallel._attention import ring_attention, ulysses_attention, usp_attention
from attnplug.parallel._exchange import ParallelError
from attnplug.parallel._model import ContextParallelHandle, context_parallel
from attnplug.parallel._packed import ring_varlen_attn
from attnplug.parallel._sharding import sequence_positions, shard_sequence, unshard_sequence

__all__ = [
    "ContextParallelHandle",
    "ParallelError",
    "context_parallel",
    "ring_attention",
    "ring_varlen_attn",
    "sequence_positions",
    "shard_sequence",
    "ulysses_attention",
    "unshard_sequence",
    "usp_attention",
]
