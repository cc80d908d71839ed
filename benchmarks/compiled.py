"""What attnplug leaves in a compiled graph besides the chosen kernel, and how often it compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import attnplug
import harness
from attnplug import Capabilities, ImplSpec, SDPBackend, sdpa_kernel
from harness import Result


class Opaque:
    """A kernel that no trace looks into."""

    @staticmethod
    def forward(params: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(params.query), None


class Graphs:
    """A function, compiled with a backend that keeps its graphs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        self.call = torch.compile(function, backend=self._keep, fullgraph=True)

    def _keep(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def nodes(self, *inputs: Tensor) -> int:
        """Return the number of calls in the graph for these inputs."""
        self.call(*inputs)
        return sum(node.op.startswith("call") for node in self.graphs[-1].graph.nodes)


def measure(quick: bool) -> Iterator[Result]:
    capabilities = Capabilities(devices=("cpu",))
    spec = ImplSpec(name="opaque", kernel=Opaque, backend=None, capabilities=capabilities, priority=-999)
    attnplug.register_impl(spec)
    yield from extra_nodes()
    yield from extra_nodes_of_the_drop_in()
    yield from compiles(steps=4 if quick else 64)


def extra_nodes() -> Iterator[Result]:
    """Yield the nodes of a graph beyond those of the kernel called directly."""
    query = torch.randn(1, 2, 8, 16)

    def flash(query: Tensor) -> Tensor:
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, query, query)
        return out

    own = {
        "torch": Graphs(lambda query: torch.nn.functional.scaled_dot_product_attention(query, query, query)).nodes(
            query
        ),
        "aten_flash": Graphs(flash).nodes(query),
        "opaque": 2,  # one operator, and taking the first of what it returns
    }
    for impl, expected in own.items():
        found = Graphs(lambda query, impl=impl: attention(query, query, query, impl=impl)).nodes(query)
        details = {"kernel's own": expected}
        yield Result(f"compiled graph, {impl}: nodes beyond the kernel's own", found - expected, "nodes", 0, 0, details)


def extra_nodes_of_the_drop_in() -> Iterator[Result]:
    """Yield the nodes of a model that asks for PyTorch's function, beyond those of the kernel that it gets."""
    query = torch.randn(1, 2, 8, 16)
    for scope, expected in (None, 1), ("torch", 1), ("aten_flash", 2), ("opaque", 2):
        with attnplug.patch_torch(), sdpa_kernel(scope) if scope else nullcontext():
            found = Graphs(lambda query: torch.nn.functional.scaled_dot_product_attention(query, query, query)).nodes(
                query
            )
        name = f"compiled graph, patched, {scope or 'plain'}: nodes beyond the kernel's own"
        yield Result(name, found - expected, "nodes", 0, 0, {"kernel's own": expected})


def compiles(steps: int) -> Iterator[Result]:
    """Yield how often a compiled function is compiled again."""
    query, key, value = torch.randn(3, 1, 2, steps + 8, 16)
    compiled = Graphs(attention)
    families = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    counts = []
    for _ in range(3):
        for family in families:
            with sdpa_kernel(family):
                compiled.call(query, key, value)
        counts.append(len(compiled.graphs))
    yield Result("compiles, each new scope", counts[0] / len(families), "each", 1, 1)
    yield Result("compiles, coming back to a scope", (counts[-1] - counts[0]) / 4, "each", 0, 0)

    compiled = Graphs(lambda query: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    counts = []
    for _ in range(3):
        for name in ("aten_flash", "aten_math"):
            attnplug.activate_flash_attention_impl(name)
            compiled.call(query)
            attnplug.restore_flash_attention_impl()
            compiled.call(query)
        counts.append(len(compiled.graphs))
    yield Result("compiles, each new activation of F.sdpa, and none", counts[0] / 3, "each", 1, 1)
    yield Result("compiles, coming back to an activation", (counts[-1] - counts[0]) / 8, "each", 0, 0)

    compiled = Graphs(attention)
    for step in range(8, steps + 8):
        compiled.call(query[:, :, :1], key[:, :, :step], value[:, :, :step])
    yield Result("compiles, decode loop", len(compiled.graphs), "all", 2, 2, {"steps": steps})


def attention(*tensors: Tensor, impl: str | None = None) -> Any:
    return attnplug.scaled_dot_product_attention(*tensors, impl=impl)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
