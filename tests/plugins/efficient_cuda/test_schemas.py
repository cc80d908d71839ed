"""`efficient_cuda` and `cudnn` without a GPU: real schemas and meta kernels, under fake CUDA tensors.

For every feature that an implementation declares, and every two of them: forward and backward reach PyTorch's
operators in the form that their schemas ask for, or the call is declined with a reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnplug
from attnplug import Feature, SDPAParams
from cuda_calls import (
    KERNELS,
    SPECS,
    fake_call,
    install_cudnn,
    install_sequences,
    lse_shape,
    prepared,
    register_both,
)
from cuda_kernels_emulated import check_call

from attnplug_efficient_cuda import efficient, operators  # isort: skip

SEQUENCES_OF_2_15 = (
    "_cudnn_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, bool compute_log_sumexp, float dropout_p=0.0, "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None, Tensor? seqused_k=None, "
    "Tensor? block_table=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
    "SymInt max_q, SymInt max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)"
)
"""As in `ATen/ops/_cudnn_attention_forward_ops.h` of PyTorch 2.14 and 2.15."""


@pytest.fixture(autouse=True)
def _both_and_a_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    register_both()
    install_cudnn(monkeypatch, 92500)


@pytest.fixture(scope="module")
def forward_of_2_15() -> Any:
    """An operator with the schema of PyTorch 2.15, for whoever tests with an earlier one."""
    library = torch.library.Library("attnplug_tests_2_15", "DEF")
    library.define(SEQUENCES_OF_2_15)
    yield torch.ops.attnplug_tests_2_15._cudnn_attention_forward.default
    library._destroy()


def on(device: str, value: Any) -> Any:
    """The same tensor without its values, elsewhere; the meta function indexes, which needs the device."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


class RealSchemas(TorchDispatchMode):
    """Lets the dispatcher check each call against its schema, then asks PyTorch's meta kernels for the result.

    Until 2.15 PyTorch's meta function of the CUTLASS backward lacks two of the operator's arguments, and the two
    cuDNN operators have none of their own; those of the operators above them stand in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__.split(".")[0]
        if name.startswith(("_efficient_attention", "_cudnn_attention")):
            self.seen.append(name)
        if name == "_efficient_attention_forward":
            check_call(*args[:4], cu_q=args[4], cu_k=args[5])
        if name == "_efficient_attention_backward":
            check_call(*args[1:5], cu_q=args[6], cu_k=args[7])
            return self._efficient_backward(func, args, kwargs)
        if name == "_cudnn_attention_forward":
            return self._cudnn_forward(args, kwargs)
        if name == "_cudnn_attention_backward":
            return tuple(torch.empty_like(tensor) for tensor in args[1:4])
        return func(*args, **kwargs)

    def _efficient_backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        given["grad_out"] = given.pop("grad_out_")
        meta = torch._meta_registrations.meta__efficient_attention_backward
        taken = inspect.signature(meta).parameters
        grads = meta(**{name: on("meta", value) for name, value in given.items() if name in taken})
        return tuple(on("cuda", grad) for grad in grads)

    def _cudnn_forward(self, args: Any, kwargs: Any) -> Any:
        query, key, value, bias, *_ = args
        if args[4] is None:
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(query, key, value, bias), args[8], *args[9:], **kwargs
            )
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        nothing = query.new_empty(0)
        return out, lse, args[4], args[5], args[6], args[7], nothing, nothing, nothing


MASKS = {Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT}
IMPOSSIBLE = [
    {Feature.UPPER_LEFT, Feature.LOWER_RIGHT},
    {Feature.UPPER_LEFT, Feature.VARLEN},
    {Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK},
    {Feature.BOOLEAN_MASK, Feature.MASK_GRADIENT},
    *({Feature.VARLEN, mask} for mask in MASKS),
]
"""What no call can ask for at once."""
CAUSAL = {Feature.CAUSAL, Feature.UPPER_LEFT, Feature.LOWER_RIGHT}
DECLINED: dict[str, list[tuple[set[Feature], set[Feature], str]]] = {
    "efficient_cuda": [
        ({Feature.SEQUSED_K}, MASKS, "takes no attn_mask with variable-length sequences or seqused_k"),
        ({Feature.DROPOUT}, {Feature.VARLEN, Feature.SEQUSED_K}, "draws other random numbers"),
        ({Feature.WINDOW}, {Feature.VARLEN}, "without the lower-right offset"),
    ],
    "cudnn": [
        ({Feature.VARLEN}, CAUSAL, "has a causal backward for sequences only from the upper left"),
        ({Feature.VARLEN}, {Feature.WINDOW}, "does not support window_size"),
    ],
}
"""Which pairs are declined, and why."""


def pairs() -> list[Any]:
    """Every declared feature by itself and with each other one that a call can have together with it."""
    return [
        pytest.param(name, {one, other}, id=f"{name}-{one.name}-{other.name}")
        for name, spec in SPECS.items()
        for one, other in combinations_with_replacement(sorted(spec.capabilities.features, key=str), 2)
        if {one, other} not in IMPOSSIBLE
    ]


def why_not(name: str, features: set[Feature]) -> str:
    """Return the reason that is expected against a call with these features; empty if it is to be accepted."""
    return next((why for some, others, why in DECLINED[name] if features & some and features & others), "")


@pytest.mark.parametrize(("name", "features"), pairs())
def test_every_pair_of_features_meets_the_schema_or_is_declined_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, forward_of_2_15: Any, name: str, features: set[Feature]
) -> None:
    expected = why_not(name, features)
    if name == "cudnn" and Feature.VARLEN in features:
        install_sequences(monkeypatch)
        monkeypatch.setattr(operators, "cudnn_forward", forward_of_2_15)
    with FakeTensorMode(), RealSchemas() as mode:
        inputs, options = fake_call(features, torch.float16)
        params = prepared(inputs, options)
        verdict = attnplug.can_use_impl(name, params, compute_capability=(9, 0))
        if expected:
            assert not verdict.accepted and expected in " ".join(verdict.reasons)
            return
        assert verdict.accepted, verdict.reasons
        kernel = KERNELS[name]
        with torch.no_grad():
            out, lse, *saved = kernel.forward(params)
            grads = kernel.backward(params, torch.empty_like(out), None, out, lse, *saved)
        assert (out.device, out.shape) == (params.query.device, (*params.query.shape[:-1], params.value.shape[-1]))
        assert lse.dtype == torch.float32 and lse.shape == lse_shape(params)
        for made, fake in zip((out, lse, *saved), kernel.fake(params), strict=True):
            assert (made.shape, made.stride(), made.dtype) == (fake.shape, fake.stride(), fake.dtype)
            assert made.device == fake.device  # of seeds too, as PyTorch's own trace has them
        wanting = [*inputs, params.attn_mask] if Feature.MASK_GRADIENT in features else inputs
        for tensor, grad in zip(wanting, grads, strict=False):
            if tensor is params.attn_mask:
                grad = grad.sum_to_size(tensor.shape)
            assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)
    prefix = "_efficient" if name == "efficient_cuda" else "_cudnn"
    assert mode.seen == [f"{prefix}_attention_forward", f"{prefix}_attention_backward"]


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "rows first"])
@pytest.mark.parametrize("changed", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_prepared_meets_the_schemas_of_the_operators_that_say_less(
    name: str, changed: dict[str, Any], heads_first: bool
) -> None:
    shape, kernel = (2, 4, 40, 64), KERNELS[name]
    order = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
    given = [
        torch.empty([shape[dim] for dim in order], dtype=torch.float16, device="meta").permute(order) for _ in range(4)
    ]
    query, key, value = (tensor.requires_grad_() for tensor in given[:3])
    params = SDPAParams(query, key, value, **{"scale": 64**-0.5, **changed})
    with torch.no_grad(), RealSchemas():
        run = kernel.prepare(params)
        assert run is not None
        out, lse, kept = run(query, key, value)
        assert lse is None and out.shape == shape
        back = kernel.prepare_backward(params, given[3], out, None, kept)
        assert back is not None
        grads = back(query, key, value, given[3], out, None, kept)
    assert [grad.shape for grad in grads] == [shape] * 3


def test_a_backward_of_fake_tensors_leaves_none_to_later_calls() -> None:
    with FakeTensorMode(), torch.no_grad():
        query, grad_out, out = (torch.empty(2, 40, 4, 64, device="cuda").transpose(1, 2) for _ in range(3))
        params = SDPAParams(query, query, query, scale=0.125)
        assert efficient.prepare_backward(params, grad_out, out, None) is not None
    test_what_is_prepared_meets_the_schemas_of_the_operators_that_say_less("efficient_cuda", {}, True)


@pytest.mark.parametrize(
    ("where", "is_capturing", "read"),
    [("cpu", False, "cpu"), ("cuda", True, "cuda"), ("cuda", False, "cpu"), ("cpu", True, None)],
    ids=["both eager", "both captured", "forward replayed", "backward captured alone"],
)
def test_seeds_of_dropout_are_where_backward_reads_them(
    monkeypatch: pytest.MonkeyPatch, where: str, is_capturing: bool, read: str | None
) -> None:
    """PyTorch's backward takes an address while a CUDA graph is captured, and numbers on the host otherwise."""
    found: list[str] = []

    def backward(*args: Any, **kwargs: Any) -> Any:
        found.extend(tensor.device.type for tensor in args[12:14])
        return (*(torch.empty_like(tensor) for tensor in args[1:4]), None)

    monkeypatch.setattr(operators, "efficient_backward", backward)
    with FakeTensorMode(), torch.no_grad():
        params = prepared(*fake_call({Feature.DROPOUT}, torch.float16))
        out, lse, *seeds = efficient.fake(params)
        seeds = [torch.empty((), dtype=seed.dtype, device=where) for seed in seeds]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
        if read is None:
            with pytest.raises(RuntimeError, match="forward ran before the capture"):
                efficient.backward(params, out, None, out, lse, *seeds)
        else:
            efficient.backward(params, out, None, out, lse, *seeds)
    assert found == [read] * (0 if read is None else 2)


def test_causal_sequences_without_gradients_meet_the_schema(
    monkeypatch: pytest.MonkeyPatch, forward_of_2_15: Any
) -> None:
    install_sequences(monkeypatch)
    monkeypatch.setattr(operators, "cudnn_forward", forward_of_2_15)
    with FakeTensorMode(), RealSchemas() as mode, torch.no_grad():
        params = prepared(*fake_call({Feature.VARLEN, Feature.CAUSAL, Feature.GQA}, torch.bfloat16))
        assert attnplug.can_use_impl("cudnn", params, compute_capability=(9, 0))
        out, lse = KERNELS["cudnn"].forward(params)
    assert out.shape == params.query.shape and lse.shape == lse_shape(params)
    assert mode.seen == ["_cudnn_attention_forward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 5, 64, 100, 512])
def test_efficient_cuda_brings_any_head_size_into_step(dtype: torch.dtype, size: int) -> None:
    with FakeTensorMode(), RealSchemas():
        inputs, options = fake_call({Feature.ADDITIVE_MASK}, dtype, size=size, keys=13)
        params = prepared(inputs, options)
        assert attnplug.can_use_impl("efficient_cuda", params, compute_capability=(8, 0))
        with torch.no_grad():
            out, lse = efficient.forward(params)
            grads = efficient.backward(params, torch.empty_like(out), None, out, lse)
        assert [grad.shape for grad in grads[:3]] == [tensor.shape for tensor in inputs]


def test_the_schemas_of_this_release_are_those_that_are_called() -> None:
    assert operators.changed(*operators._EXPECTED) == ()


def test_the_schema_of_later_releases_is_no_change(monkeypatch: pytest.MonkeyPatch, forward_of_2_15: Any) -> None:
    monkeypatch.setattr(operators, "find_schema", lambda name: forward_of_2_15._schema)
    assert operators.changed.__wrapped__("_cudnn_attention_forward") == ()


@pytest.mark.parametrize("name", [name for name in sorted(operators._EXPECTED) if "dot_product" not in name])
def test_a_changed_schema_is_a_reason_that_names_operator_and_release(
    monkeypatch: pytest.MonkeyPatch, on_devices: Callable[..., None], name: str
) -> None:
    text = str(operators.find_schema(name))
    changes = {
        "does not exist": None,
        "'Tensor queries' as argument": text.replace("Tensor query,", "Tensor queries,"),
        "needs an argument that is not known here: 'Tensor sinks'": text.replace(") ->", ", Tensor sinks) ->", 1),
        "where 'float? scale' is expected": text.replace("float? scale=None", "float scale=1.0"),
        "returns 1 values": text.partition(" -> ")[0] + " -> Tensor",
    }
    implementation = "cudnn" if "cudnn" in name else "efficient_cuda"
    params = prepared(*_plain_call())
    find = operators.find_schema
    try:
        for reason, changed in changes.items():
            schema = None if changed is None else torch._C.parse_schema(changed)
            monkeypatch.setattr(operators, "find_schema", lambda asked, s=schema: s if asked == name else find(asked))
            operators.changed.cache_clear()
            (found,) = attnplug.can_use_impl(implementation, params, compute_capability=(9, 0)).reasons
            assert reason in found and f"aten::{name}" in found and torch.__version__ in found
            on_devices("cpu", "cuda")
            with pytest.raises(attnplug.NoImplementationError, match=f"aten::{name} of PyTorch"):
                attnplug.activate_flash_attention_impl(implementation)
        appended = torch._C.parse_schema(text.replace(") ->", ", Tensor? sinks=None) ->", 1))
        monkeypatch.setattr(operators, "find_schema", lambda asked: appended if asked == name else find(asked))
        operators.changed.cache_clear()
        assert attnplug.can_use_impl(implementation, params, compute_capability=(9, 0))
    finally:
        operators.changed.cache_clear()


def _plain_call() -> Any:
    with FakeTensorMode():
        return fake_call(set(), torch.float16)
