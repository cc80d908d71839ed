"""Models and modules over several ranks, and the loss and gradients of one rank: what ranks are given to run."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import attnplug
from attnplug import parallel
from shared_sequences import cut, joined, mesh_of


def tiny_llama(**config: Any) -> Any:
    """Return a small Llama, the same on each rank."""
    import transformers

    import attnplug.integrations.transformers

    attnplug.integrations.transformers.register()
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **config,
        }
    )
    return transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="attnplug")


def trained(method: str, mesh: tuple[int, int] | None = None, length: int = 24, impl: str | None = None) -> None:
    """Train a Llama for one step over all ranks, and hold loss and gradients against one rank's, by the rule."""
    group: Any = dist.group.WORLD if mesh is None else mesh_of(*mesh)
    torch.manual_seed(3)
    tokens = torch.randint(64, (2, length))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    heads = {"num_key_value_heads": 4} if method == "ulysses" else {}
    model = tiny_llama(**heads)
    low, ref = tiny_llama(**heads), tiny_llama(**heads).double()
    handle = parallel.context_parallel(model, group, method, impl=impl)
    output = model(input_ids=tokens, labels=labels)
    assert output.logits.shape[1] < length
    output.loss.backward()
    found = {"loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        found[name] = parameter.grad / dist.get_world_size()
    on_one = [_step(each, tokens, labels) for each in (low, ref)]
    for name, tensor in found.items():
        _assert_near(name, tensor, *(each[name] for each in on_one))
    handle.remove()
    torch.testing.assert_close(model(input_ids=tokens, labels=labels).loss, low(input_ids=tokens, labels=labels).loss)


def _step(model: Any, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad for name, each in model.named_parameters()}}


def _assert_near(name: str, actual: Tensor, low: Tensor, ref: Tensor) -> None:
    """The rule of the contract, with the sum of absolute values of each element taken for the gradient's largest."""
    error, allowed = (actual.double() - ref).abs().max().item(), 3 * (low.double() - ref).abs().max().item()
    allowed += 2 * (ref.float() + 0.3 - 0.3 - ref.float()).abs().max().item()
    allowed += 8 * torch.finfo(torch.float32).eps * ref.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def fails_on_padding() -> str:
    model = tiny_llama()
    handle = parallel.context_parallel(model, dist.group.WORLD)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :3] = 0
    try:
        model(input_ids=torch.zeros(2, 24, dtype=torch.int64), attention_mask=mask)
    except ValueError as error:
        return str(error)
    finally:
        handle.remove()
    return ""


class Block(torch.nn.Module):
    """A module that calls attnplug itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.project = torch.nn.Linear(32, 96)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.project(states).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return attnplug.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def bound(method: str, mesh: tuple[int, int] | None = None) -> None:
    """Run a module of one's own over all ranks, and hold it against one rank."""
    group: Any = dist.group.WORLD if mesh is None else mesh_of(*mesh)
    module, alone = Block(), Block()
    folded = method != "ulysses"
    states = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    with parallel.context_parallel(module, group, method, impl="math_ref"):
        out = module(cut(states, group, folded, dim=1))
        out.square().sum().backward()
    expected = alone(states)
    expected.square().sum().backward()
    torch.testing.assert_close(joined(out.detach(), group, folded, 32, dim=1), expected.detach())
    dist.all_reduce(grad := module.project.weight.grad)
    torch.testing.assert_close(grad, alone.project.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(states), expected)
    assert not [name for name in attnplug.list_flash_attention_impls() if "context_parallel" in name]


def fully_sharded() -> None:
    """Train one step with the parameters sharded over the same ranks that share the sequence."""
    from torch.distributed.fsdp import fully_shard

    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    model, alone = tiny_llama(), tiny_llama()
    parallel.context_parallel(model, dist.group.WORLD)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    _compare_steps(model, alone, tokens, lambda grad: grad.full_tensor())


def with_tensor_parallel() -> None:
    """Train one step with heads over one dimension of a mesh and the sequence over the other."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of(2, 2)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    model, alone = tiny_llama(), tiny_llama()
    for layer in model.model.layers:
        names = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
        plan: dict[str, Any] = {name: ColwiseParallel() for name in names}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh["heads"], plan)
    parallel.context_parallel(model, mesh["ring"])

    def whole(grad: Tensor) -> Tensor:
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        dist.all_reduce(grad, group=mesh["ring"].get_group())
        return grad / 2

    _compare_steps(model, alone, tokens, whole)


def _compare_steps(model: Any, alone: Any, tokens: Tensor, whole: Callable[[Any], Tensor]) -> None:
    steps = [each(input_ids=tokens, labels=tokens).loss for each in (model, alone)]
    for loss in steps:
        loss.backward()
    torch.testing.assert_close(*steps)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def handed_back() -> list[str]:
    """Return what is said of a wrong use of `context_parallel`; a model is as it was afterwards, and is let go."""
    model = tiny_llama()
    before = model.config._attn_implementation
    handle = parallel.context_parallel(model, dist.group.WORLD)
    said = [_refused(model, {}), _refused(Block(), {"impl": "mathref"}), _refused(Block(), {"method": None})]
    said.append(_refused(torch.nn.ModuleList([Block()]), {}))
    assert not [name for name in attnplug.list_flash_attention_impls() if "context_parallel" in name]
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == before
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
    return said


def interrupted() -> None:
    """Interrupt `context_parallel` and its `remove()` once at each of their lines: nothing stays of either."""
    model, block = tiny_llama(), Block()
    untouched = [_what_is_in_place(module) for module in (model, block)]
    for module, before in zip((model, block), untouched, strict=True):
        lines: set[int] = set()
        while True:
            handle = None
            try:
                with _interrupting(lines):
                    handle = parallel.context_parallel(module, dist.group.WORLD)
                    assert _what_is_in_place(module) != before
                    handle.remove()
            except KeyboardInterrupt:
                if handle is not None:
                    handle.remove()
                assert _what_is_in_place(module) == before, max(lines)
            else:
                break
        assert len(lines) > 15 and _what_is_in_place(module) == before


def _what_is_in_place(module: Any) -> tuple[Any, ...]:
    registered = [name for name in attnplug.list_flash_attention_impls() if "context_parallel" in name]
    attention = module.config._attn_implementation if hasattr(module, "config") else type(module)
    return registered, attention, len(module._forward_hooks), len(module._forward_pre_hooks)


@contextmanager
def _interrupting(lines: set[int]) -> Iterator[None]:
    """Interrupt at a line that is not among these, and add it."""

    def interrupt(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_globals["__name__"] != "attnplug.parallel._model":
            return None
        if event == "line" and frame.f_lineno not in lines:
            lines.add(frame.f_lineno)
            raise KeyboardInterrupt
        return interrupt

    tracer = sys.gettrace()
    sys.settrace(interrupt)
    try:
        yield
    finally:
        sys.settrace(tracer)


def _refused(module: Any, options: dict[str, Any]) -> str:
    try:
        parallel.context_parallel(module, dist.group.WORLD, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError(options)


def compiled() -> None:
    """Run a compiled model over all ranks, and hold it against one that is not compiled."""
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    model = tiny_llama()
    handle = parallel.context_parallel(model, dist.group.WORLD)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(tokens).logits, model(tokens).logits)
    handle.remove()


def verified() -> list[str]:
    """Return why `verify` compares nothing of what one rank has of a module's call."""
    module = Block()
    handle = parallel.context_parallel(module, dist.group.WORLD)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        module(torch.randn(2, 8, 32))
    handle.remove()
    query = torch.randn(1, 2, 8, 16, requires_grad=True)

    def attend(query: Tensor) -> Tensor:
        return parallel.ring_attention(query, query, query, group=dist.group.WORLD, is_causal=True)

    for run in (attend, torch.compile(attend, backend="eager", fullgraph=True)):
        with attnplug.verify(1.0, on_mismatch="raise") as alone:
            run(query).sum().backward()
        assert alone.results == alone.gradients == 0 and not alone.wrong
    return list(watched.skipped)
