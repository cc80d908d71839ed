"""A program that uses every public name, for a type checker alone: what a name gives is what it says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend as TorchBackend
from torch.nn.attention.bias import CausalVariant as TorchVariant
from typing_extensions import assert_type

import attnplug
import attnplug.bench
import attnplug.parallel
import attnplug.tuning
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, Kernel, SDPAParams, SDPBackend, Verdict

query = torch.randn(1, 2, 4, 8)
starts = torch.tensor([0, 4], dtype=torch.int32)
wanted: bool = query.sum().item() > 0

# Calls ------------------------------------------------------------------------------------------------

sdpa, varlen = attnplug.scaled_dot_product_attention, attnplug.varlen_attn
assert_type(sdpa(query, query, query), Tensor)
assert_type(sdpa(query, query, query, None, 0.0, True, None, False, softcap=3, impl="math_ref"), Tensor)
assert_type(sdpa(query, query, query, return_lse=False), Tensor)
assert_type(sdpa(query, query, query, return_lse=True), tuple[Tensor, Tensor])
assert_type(sdpa(query, query, query, return_lse=wanted), Tensor | tuple[Tensor, Tensor])
sdpa(query, query, query, is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT, window_size=(2, 0))
sdpa(query, query, query, is_causal=True, causal_variant=TorchVariant.LOWER_RIGHT)
assert_type(varlen(query[0], query[0], query[0], starts, starts, 4, 4), Tensor)
assert_type(varlen(query[0], query[0], query[0], starts, None, 4, 4, return_lse=True), tuple[Tensor, Tensor])

# Choosing ---------------------------------------------------------------------------------------------

with attnplug.sdpa_kernel([SDPBackend.MATH, TorchBackend.MATH, "torch"], set_priority=True):
    sdpa(query, query, query)


@attnplug.sdpa_kernel("aten_math")
def decorated(size: int) -> Tensor:
    return sdpa(query, query, query, scale=1 / size)


assert_type(decorated(3), Tensor)
attnplug.activate_flash_attention_impl("aten_flash")
assert_type(attnplug.current_flash_attention_impl(), str | None)
attnplug.restore_flash_attention_impl()
assert_type(attnplug.list_flash_attention_impls(), list[str])
handle: attnplug.PatchHandle = attnplug.patch_torch()
handle.remove()
binding: attnplug.BindingHandle = attnplug.bind(torch.nn.Identity(), [SDPBackend.MATH])
binding.remove()
contexts = attnplug.checkpoint_contexts
attnplug.WARN_FOR_UNFUSED_KERNELS = True
with attnplug.record() as calls:
    sdpa(query, query, query)
assert_type(calls, list[attnplug.RecordedCall])
assert_type(calls[0].backend, SDPBackend | None)
explanation = attnplug.explain(query, query, query, is_causal=True, impl="torch")
assert_type(explanation, attnplug.Explanation)
assert_type(explanation.candidates, tuple[Verdict, ...])
assert_type(attnplug.compute_capability(query.device), tuple[int, int] | None)
attnplug.bind_cuda_context()

# Watching ---------------------------------------------------------------------------------------------

with attnplug.verify(0.01, reference="math_ref", on_mismatch="raise", seed=1) as watched:
    sdpa(query, query, query)
assert_type(watched.mismatches, list[attnplug.Mismatch])
assert_type(watched.mismatches[0].error, float | None)
attnplug.verify(0.01, on_mismatch=lambda mismatch: mismatch.call).start().stop()
with attnplug.summary() as ran:
    sdpa(query, query, query)
assert_type(ran.rows, list[attnplug.Ran])
assert_type(ran.shares(object()), dict[str, attnplug.Share])
telling: attnplug.Instrumentation = attnplug.instrument()
telling.remove()

# What authors write -----------------------------------------------------------------------------------

capabilities = Capabilities(
    devices=("cpu",),
    dtypes=["float32", torch.float64],
    compute_capability=(8, 0),
    architectures={"gfx942"},
    head_sizes=range(8, 257, 8),
    features={Feature.CAUSAL, "LSE"},
) | Capabilities(features=Feature)
assert_type(capabilities.features, frozenset[Feature])
assert_type(capabilities.dtypes, frozenset[str] | None)
# What is wrong is flagged: mypy refuses a comment that ignores nothing, here and below.
Capabilities(features={Feature.CASUAL})  # type: ignore[attr-defined]
Capabilities(planets=("mars",))  # type: ignore[call-arg]


def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
    assert_type(params.query, Tensor)
    assert_type(params.is_varlen, bool)
    assert_type(params.lse_shape, tuple[int, ...])
    assert_type(params.lse_dtype, torch.dtype)
    assert_type(params.needs_grad, bool)
    params.scale = 2.0  # type: ignore[misc]
    logits = params.scale * params.query @ params.key.mT
    if params.attn_mask is not None:
        logits = logits + params.attn_mask
    lse = query.new_empty(params.lse_shape, dtype=params.lse_dtype)
    return torch.softmax(logits, -1) @ params.value, lse


def supports(params: SDPAParams) -> str | None:
    return "is variable length" if params.is_varlen else None


kernel = Kernel(forward=forward, supports=supports, composite=True)
Kernel(forward=forward, support=supports)  # type: ignore[call-arg]
specs = [ImplSpec(name=n, kernel=k, backend=SDPBackend.MATH) for n, k in (("a", kernel), ("b", "package.module"))]
ImplSpec(name="c", kernel=forward, backend=TorchBackend.MATH, capabilities=capabilities, requires=("triton",))
attnplug.register_impl(specs[0], replace=True)
attnplug.unregister_impl("a")


@attnplug.hookimpl
def attnplug_register_impls() -> list[ImplSpec]:
    return specs


class Handle:
    def remove(self) -> None: ...


attnplug.register_flash_attention_impl("mine", register_fn=Handle)
verdict = attnplug.can_use_impl("torch", SDPAParams(query, query, query, None, 0.0, True, False, softcap=2.0))
assert_type(verdict.reasons, tuple[str, ...])
records = attnplug.list_impls()
assert_type(records, list[attnplug.ImplRecord])
assert_type(records[0].capabilities, Capabilities)
assert_type(attnplug.__version__, str)

# Errors -----------------------------------------------------------------------------------------------

errors: list[type[attnplug.AttnplugError]] = [
    attnplug.ChoicesError,
    attnplug.ConfigError,
    attnplug.DuplicateImplementationError,
    attnplug.GradientError,
    attnplug.KernelError,
    attnplug.MismatchError,
    attnplug.NoImplementationError,
    attnplug.PluginError,
    attnplug.ScopeError,
    attnplug.SpecError,
    attnplug.UnknownImplementationError,
]
caught: list[type[UserWarning]] = [
    attnplug.ChoicesWarning,
    attnplug.FallbackWarning,
    attnplug.MismatchWarning,
    attnplug.PluginWarning,
]

# Measuring --------------------------------------------------------------------------------------------

with attnplug.capture() as cases:
    sdpa(query, query, query)
assert_type(cases, attnplug.bench.Cases)
choices = attnplug.tune(cases, ["torch"], seconds=0.1)
assert_type(choices, attnplug.Choices)
assert_type(attnplug.Choices.load("choices.json") | choices, attnplug.Choices)
for choice in choices:
    assert_type(choice, attnplug.tuning.Choice)
    assert_type(choice.gain, float)
attnplug.use_choices(choices)
attnplug.restore_choices()

# Several ranks ----------------------------------------------------------------------------------------

part = attnplug.parallel.shard_sequence(query, group=None)
assert_type(part, Tensor)
assert_type(attnplug.parallel.ring_attention(part, part, part, group=None, is_causal=True), Tensor)
assert_type(attnplug.parallel.usp_attention(part, part, part, mesh=None, return_lse=True), tuple[Tensor, Tensor])
assert_type(
    attnplug.parallel.ulysses_attention(part, part, part, group=None, attn_mask=query, return_lse=wanted),
    Tensor | tuple[Tensor, Tensor],
)
assert_type(
    attnplug.parallel.ring_varlen_attn(part, part, part, part, group=None, return_lse=True), tuple[Tensor, Tensor]
)
