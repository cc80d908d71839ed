"""The wall time of a compiled encoder of twelve layers: attnplug's function, and the drop-in, against PyTorch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import attnplug
import harness
from harness import Result, alternate

WARM = 5


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
    functions = {"F.sdpa": theirs, "attnplug": ours, "F.sdpa, patched": theirs}
    models = {name: encoder(layers, attention) for name, attention in functions.items()}
    for model in models.values():
        model.load_state_dict(
            models["F.sdpa"].state_dict(), assign=True
        )  # the same memory: its place is a matter of luck
    compiled = {
        name: torch.compile(by_itself(model), backend=backend, fullgraph=True) for name, model in models.items()
    }

    @contextmanager
    def warm(name: str) -> Iterator[None]:
        """Run before the clock does: switching leaves cold caches, and a patch makes Dynamo check each guard again."""
        with patched() if name == "F.sdpa, patched" else nullcontext():
            for _ in range(WARM):
                torch.testing.assert_close(compiled[name](hidden), expected)
            yield

    with torch.no_grad():
        expected = models["F.sdpa"](hidden)
        ways = {name: lambda model=model: model(hidden) for name, model in compiled.items()}
        times = alternate(ways, turns, calls, {name: lambda name=name: warm(name) for name in ways})
    for name in ("attnplug", "F.sdpa, patched"):
        details = {"us": times.microseconds(name), "of it": times.microseconds("F.sdpa"), "layers": layers}
        ratio = times.ratio(name, "F.sdpa")
        yield Result(f"compiled 12-layer encoder, {name} / F.sdpa", ratio, "ratio", 1.05, 1.0, details)


def by_itself(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Give a model code of its own: what is compiled is kept by code, and the others' guards would be tried first."""

    def forward(hidden: Tensor) -> Tensor:
        return model(hidden)

    forward.__code__ = forward.__code__.replace()
    return forward


def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attnplug.scaled_dot_product_attention(query, key, value)


@contextmanager
def patched() -> Iterator[None]:
    """Route PyTorch's function, and choose it all the same: the kernels are the same, only the way is another."""
    with attnplug.patch_torch(), attnplug.sdpa_kernel("torch"):
        yield


def encoder(layers: int, attention: Callable[..., Any]) -> nn.Module:
    return nn.Sequential(*(Layer(64, 4, attention) for _ in range(layers))).eval()


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
