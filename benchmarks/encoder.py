"""The wall time of a compiled encoder of twelve layers: attnplug's function against PyTorch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import attnplug
import harness
from harness import Result, alternate


class Layer(nn.Module):
    """Attention and a feed-forward network, normalised before."""

    def __init__(self, size: int, heads: int, attention: Callable[..., Any]) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.packed, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.packed(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        hidden = hidden + self.out(self.attention(query, key, value).transpose(1, 2).flatten(2))
        return hidden + self.feed_forward(self.norms[1](hidden))


def measure(quick: bool) -> Iterator[Result]:
    layers, turns, calls, backend = (1, 2, 1, "eager") if quick else (12, 300, 1, "inductor")
    torch.set_num_threads(1)
    hidden = torch.randn(1, 32, 64)
    functions = {
        "F.sdpa": torch.nn.functional.scaled_dot_product_attention,
        "attnplug": attnplug.scaled_dot_product_attention,
    }
    models = {name: encoder(layers, attention) for name, attention in functions.items()}
    models["attnplug"].load_state_dict(models["F.sdpa"].state_dict())
    compiled = {name: torch.compile(model, backend=backend, fullgraph=True) for name, model in models.items()}
    with torch.no_grad():
        torch.testing.assert_close(*(model(hidden) for model in compiled.values()))
        for model in compiled.values():
            model(hidden)
        times = alternate({name: lambda model=model: model(hidden) for name, model in compiled.items()}, turns, calls)
    details = {"us": times.microseconds("attnplug"), "of it": times.microseconds("F.sdpa"), "layers": layers}
    ratio = times.ratio("attnplug", "F.sdpa")
    yield Result("compiled 12-layer encoder, attnplug / F.sdpa", ratio, "ratio", 1.05, 1.0, details)


def encoder(layers: int, attention: Callable[..., Any]) -> nn.Module:
    return nn.Sequential(*(Layer(64, 4, attention) for _ in range(layers))).eval()


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
