"""`efficient_cuda` and `cudnn` without a card: against emulated kernels, real schemas and meta kernels.

Numbers come from the operators as PyTorch's sources describe them, written again in float64 with their
checks, their unwritten memory and their traps (`cuda_kernels_emulated`), and are compared with PyTorch's
own attention in float64. Shapes and arguments meet the real schemas under fake CUDA tensors. Neither says
anything about what a card computes.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnplug
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams, SDPBackend
from cuda_kernels_emulated import Cudnn, Cutlass, check_call
from reference import attention

plugin = pytest.importorskip("attnplug_efficient_cuda", reason="attnplug-efficient-cuda is not installed")
from attnplug_efficient_cuda import cudnn, dense, efficient, hardware, layout, operators  # noqa: E402

INF = float("inf")
UPPER_LEFT, LOWER_RIGHT = CausalVariant.UPPER_LEFT, CausalVariant.LOWER_RIGHT
SPECS = {spec.name: spec for spec in plugin.attnplug_register_impls()}
CARDS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def emulate(monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    """Register `emulated`, the plugin's own code on emulated kernels, for CPU tensors."""
    kernel = Cutlass() if kind == "efficient_cuda" else Cudnn()
    prefix = "efficient" if kind == "efficient_cuda" else "cudnn"
    monkeypatch.setattr(operators, f"{prefix}_forward", kernel.forward)
    monkeypatch.setattr(operators, f"{prefix}_backward", kernel.backward)
    features = SPECS[kind].capabilities.features
    capabilities = Capabilities(devices=("cpu",), features=features)
    module = efficient if kind == "efficient_cuda" else cudnn
    attnplug.register_impl(
        ImplSpec(name="emulated", kernel=module, backend=SDPBackend.MATH, capabilities=capabilities, priority=-1000)
    )
    return kernel


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> Cutlass:
    return emulate(monkeypatch, "efficient_cuda")


@pytest.fixture(params=[3, 4], ids=["lse of 3 dimensions", "lse of 4 dimensions"])
def emulated_cudnn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Cudnn:
    monkeypatch.setattr(hardware, "cudnn_version", lambda: 91900)
    kernel = emulate(monkeypatch, "cudnn")
    kernel.lse_rank = request.param
    return kernel


def tensors(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    size: int = 8,
    value_size: int = 8,
    dtype: torch.dtype = torch.float32,
    heads_first: bool = True,
) -> list[Tensor]:
    shapes = [
        (batch, heads, queries, size),
        (batch, kv_heads, keys, size),
        (batch, kv_heads, keys, value_size),
    ]
    if heads_first:
        return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return [torch.randn(b, s, h, e, dtype=dtype).transpose(1, 2).requires_grad_() for b, h, s, e in shapes]


def seen_by(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    causal_variant: CausalVariant = UPPER_LEFT,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`(queries, keys)`, from the contract's numbers 5 and 6."""
    row = torch.arange(queries)[:, None] + (keys - queries if causal_variant == LOWER_RIGHT else 0)
    column, (left, right) = torch.arange(keys), window_size
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if is_causal:
        seen &= column <= row
    if left >= 0:
        seen &= column >= row - left
    if right >= 0:
        seen &= column <= row + right
    return seen


def pytorch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seen: Tensor) -> Tensor:
    """PyTorch's attention in float64; `seen` broadcasts to the logits."""
    hidden = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -INF)
    if attn_mask is not None:
        given = attn_mask
        if attn_mask.dtype == torch.bool:
            given = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -INF)
        hidden = hidden + given.double()
    hidden = hidden.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key, value)), attn_mask=hidden, enable_gqa=True
    )


def assert_same(call: dict[str, Any], seen: Tensor, tolerance: float = 2e-5, seqused_k: Tensor | None = None) -> None:
    """Assert that out, lse and all gradients of a dense call are PyTorch's, in float64."""
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    out, lse = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, return_lse=True, impl="emulated")
    expected = pytorch(query, key, value, mask, seen)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    options = {name: call[name] for name in ("is_causal", "causal_variant", "window_size", "seqused_k") if name in call}
    options["causal_variant"] = int(options.get("causal_variant", UPPER_LEFT))
    _, expected_lse = attention(query, key, value, mask, enable_gqa=True, **options)
    torch.testing.assert_close(lse.double(), torch.as_tensor(expected_lse), atol=tolerance, rtol=tolerance)
    wanting = [t for t in (query, key, value, mask) if t is not None and t.requires_grad]
    if not wanting:
        return
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(out, wanting, grad.to(out.dtype))
    right = torch.autograd.grad(expected, wanting, grad.to(out.dtype).double())
    for tensor, got, want in zip(wanting, found, right, strict=True):
        assert got.shape == tensor.shape and got.dtype == tensor.dtype
        torch.testing.assert_close(got, want.to(got.dtype), atol=5 * tolerance, rtol=5 * tolerance)


LENGTHS = [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1), (40, 33)]
BANDS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_variant": LOWER_RIGHT},
    {"window_size": (2, 0)},
    {"is_causal": True, "window_size": (3, 1)},
    {"window_size": (-1, 0)},
    {"window_size": (0, 0), "causal_variant": LOWER_RIGHT},
    {"window_size": (2, 1)},
    {"window_size": (-1, 2), "causal_variant": LOWER_RIGHT},
    {"window_size": (1, -1)},
]
MASKS = [
    ("float", (1, 1, 1, 7)),
    ("float", (2, 1, 1, 7)),
    ("float", (1, 4, 5, 7)),
    ("float", (2, 4, 5, 7)),
    ("float", (2, 1, 5, 1)),
    ("bool", (2, 1, 1, 7)),
    ("bool", (5, 7)),
    ("bool", (2, 4, 5, 7)),
    ("bool", (4, 1, 1)),
]


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask with one row that sees nothing, if it has rows of its own."""
    mask = torch.rand(shape) > 0.4
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask[..., 1, :] = False
    if kind == "bool":
        return mask
    return torch.randn(shape, dtype=dtype).masked_fill(~mask, -INF).requires_grad_()


class TestDense:
    """efficient_cuda, the plugin's code on the emulated CUTLASS kernel."""

    @pytest.mark.parametrize("band", BANDS, ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    def test_bands_of_unequal_lengths_are_those_of_pytorch(
        self, cutlass: Cutlass, band: dict[str, Any], lengths: tuple[int, int]
    ) -> None:
        query, key, value = tensors(queries=lengths[0], keys=lengths[1], batch=1)
        call = {"query": query, "key": key, "value": value, **band}
        assert_same(call, seen_by(*lengths, **band))

    @pytest.mark.parametrize(("kind", "shape"), MASKS, ids=str)
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize(
        "band", [{}, {"is_causal": True}, {"window_size": (2, 0)}, {"window_size": (2, 1)}], ids=str
    )
    def test_masks_of_every_broadcast_form_and_their_gradients_are_those_of_pytorch(
        self, cutlass: Cutlass, kind: str, shape: tuple[int, ...], kv_heads: int, band: dict[str, Any]
    ) -> None:
        query, key, value = tensors(heads=4, kv_heads=kv_heads)
        call = {"query": query, "key": key, "value": value, "attn_mask": make_mask(kind, shape), **band}
        assert_same(call, seen_by(5, 7, **band))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("sizes", [(8, 8), (5, 3), (24, 72), (1, 1)], ids=str)
    @pytest.mark.parametrize("heads_first", [True, False])
    def test_any_head_sizes_and_layouts_are_brought_into_step(
        self, cutlass: Cutlass, dtype: torch.dtype, sizes: tuple[int, int], heads_first: bool
    ) -> None:
        query, key, value = tensors(
            heads=4, size=sizes[0], value_size=sizes[1], dtype=dtype, heads_first=heads_first, kv_heads=2
        )
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
        assert_same(
            {"query": query, "key": key, "value": value, "is_causal": True},
            seen_by(5, 7, is_causal=True),
            tolerance,
        )

    def test_tensors_that_start_out_of_step_are_copied(self, cutlass: Cutlass) -> None:
        storage = torch.randn(3, 2 * 2 * 5 * 8 + 3, dtype=torch.float32)
        query, key, value = (row[3:].view(2, 2, 5, 8).requires_grad_() for row in storage)
        assert_same({"query": query, "key": key, "value": value}, seen_by(5, 5))

    def test_aligned_tensors_are_not_copied(self, cutlass: Cutlass) -> None:
        query, key, value = tensors(dtype=torch.float16, heads=4, kv_heads=2, keys=16)
        mask = torch.zeros(1, 1, 5, 16, dtype=torch.float16)
        attnplug.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, impl="emulated")
        (call,) = cutlass.calls
        for given, name in ((query, "query"), (key, "key"), (mask, "bias")):
            assert call[name].untyped_storage().data_ptr() == given.untyped_storage().data_ptr(), name

    def test_float32_masks_for_half_tensors_keep_large_finite_numbers_finite(self, cutlass: Cutlass) -> None:
        query, key, value = tensors(dtype=torch.float16)
        mask = torch.zeros(2, 1, 5, 7)
        mask[..., 2] = torch.finfo(torch.float32).min
        call = {"query": query, "key": key, "value": value, "attn_mask": mask}
        assert_same(call, seen_by(5, 7), 4e-3)
        mask[:, :, 1] = torch.finfo(torch.float32).min
        _, lse = attnplug.scaled_dot_product_attention(**call, return_lse=True, impl="emulated")
        assert lse.isfinite().all()

    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_dropout_of_backward_is_that_of_forward(self, cutlass: Cutlass, kv_heads: int) -> None:
        query, key, value = tensors(heads=4, kv_heads=kv_heads)

        def run(query: Tensor) -> Tensor:
            torch.manual_seed(3)
            return attnplug.scaled_dot_product_attention(
                query, key, value, dropout_p=0.4, enable_gqa=True, impl="emulated"
            )

        direction, grad, step = torch.randn_like(query), torch.randn(2, 4, 5, 8), 1e-2
        (found,) = torch.autograd.grad(run(query), query, grad)
        difference = (run(query + step * direction) - run(query - step * direction)) / (2 * step)
        torch.testing.assert_close((found * direction).sum(), (difference * grad).sum(), atol=2e-3, rtol=2e-3)

    def test_dropout_of_everything_leaves_zeros_and_lse(self, cutlass: Cutlass) -> None:
        query, key, value = tensors()
        mask = make_mask("float", (1, 1, 5, 7))
        call = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": mask,
            "return_lse": True,
            "impl": "emulated",
        }
        out, lse = attnplug.scaled_dot_product_attention(**call, dropout_p=1.0)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, attnplug.scaled_dot_product_attention(**call)[1])
        assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (query, key, value, mask)))

    def test_calls_beyond_the_grid_or_the_random_numbers_are_split(
        self, cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dense, "GRID", 3)
        query, key, value = tensors(batch=4, heads=8, kv_heads=4)
        mask = make_mask("float", (4, 1, 5, 7))
        assert_same({"query": query, "key": key, "value": value, "attn_mask": mask}, seen_by(5, 7))
        assert len(cutlass.calls) == 8  # three batches of one key head at a time
        monkeypatch.setattr(layout, "INT32", 5 * 7 * 4 + 1)
        params = SDPAParams(query, key, value, dropout=0.5, enable_gqa=True, scale=1.0)
        out, lse, *seeds = efficient.forward(params)
        assert out.isfinite().all() and lse.isfinite().all()
        assert len(seeds) == len(efficient.fake(params)) - 2 == 32
        grads = efficient.backward(params, torch.ones_like(out), None, out, lse, *seeds)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)

    def test_dropout_beyond_what_the_kernel_can_number_is_an_error_of_its_own(self) -> None:
        with FakeTensorMode():
            query = torch.empty(1, 1, 50000, 8)
            params = SDPAParams(query, query, query, dropout=0.1, scale=1.0)
            with pytest.raises(ValueError, match=r"2\^31 draws"):
                efficient.forward(params)

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_keys_are_split_unless_determinism_is_asked_for(
        self, cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch, deterministic: bool
    ) -> None:
        asked = []

        def backward(*args: Any, **kwargs: Any) -> Any:
            asked.append(kwargs["num_splits_key"])
            return cutlass.backward(*args, **kwargs)

        monkeypatch.setattr(operators, "efficient_backward", backward)
        query, key, value = tensors()
        try:
            torch.use_deterministic_algorithms(deterministic)
            attnplug.scaled_dot_product_attention(query, key, value, impl="emulated").sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert asked == [1 if deterministic else None]


class TestSequences:
    """efficient_cuda on packed sequences, some without queries, without keys, or with more of one than the other."""

    LENGTHS_Q, LENGTHS_K = [3, 0, 5, 4, 1, 2], [4, 2, 2, 4, 0, 6]

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("used", [None, [1, 2, 0, 4, 0, 3]], ids=["all keys", "seqused_k"])
    @pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"window_size": (1, 0)}], ids=str)
    def test_each_sequence_is_as_by_itself(
        self, cutlass: Cutlass, kv_heads: int, used: list[int] | None, band: dict[str, Any]
    ) -> None:
        starts_q, starts_k = (
            torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (self.LENGTHS_Q, self.LENGTHS_K)
        )
        window = "window_size" in band
        query = torch.randn(int(starts_q[-1]) + 2, 4, 8, requires_grad=not window)
        key, value = (torch.randn(int(starts_k[-1]) + 3, kv_heads, n, requires_grad=not window) for n in (8, 12))
        with torch.no_grad():  # memory that belongs to no sequence holds whatever it holds
            key[int(starts_k[-1]) :] = value[int(starts_k[-1]) :] = float("nan")
            for b, length in enumerate(used or []):
                key[starts_k[b] + length : starts_k[b + 1]] = float("nan")
                value[starts_k[b] + length : starts_k[b + 1]] = float("nan")
        out, lse = attnplug.varlen_attn(
            query, key, value, starts_q, starts_k, 5, 6, enable_gqa=True, return_lse=True, impl="emulated",
            seqused_k=None if used is None else torch.tensor(used, dtype=torch.int32), **band,
        )  # fmt: skip
        pieces = []
        for b, (first, last) in enumerate(pairwise(starts_q)):
            count = self.LENGTHS_K[b] if used is None else used[b]
            q, k, v = query[first:last], key[starts_k[b] :][:count], value[starts_k[b] :][:count]
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            seen = seen_by(q.shape[2], count, causal_variant=LOWER_RIGHT, **band)
            piece = pytorch(q, k, v, None, seen) if count else torch.zeros(1, 4, q.shape[2], 12, dtype=torch.float64)
            pieces.append(piece[0].transpose(0, 1))
            _, right = (
                attention(q, k, v, is_causal=True, causal_variant=2, enable_gqa=True, window_size=(-1, -1))
                if (band.get("is_causal"))
                else attention(q, k, v, causal_variant=2, enable_gqa=True, **band)
            )
            torch.testing.assert_close(lse[:, first:last].double(), torch.as_tensor(right[0]), atol=2e-5, rtol=2e-5)
        pieces.append(torch.zeros(2, 4, 12, dtype=torch.float64))
        expected = torch.cat(pieces)
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
        assert (lse[:, -2:] == -INF).all()
        if not window:
            grad = torch.randn_like(out)
            found = torch.autograd.grad(out, (query, key, value), grad)
            right_grads = torch.autograd.grad(expected, (query, key, value), grad.double())
            for got, want in zip(found, right_grads, strict=True):
                torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)

    def test_more_sequences_than_the_grid_holds_are_an_error_of_its_own(self) -> None:
        with FakeTensorMode():
            tokens, starts = torch.empty(30000, 1, 8), torch.empty(30001, dtype=torch.int32)
            lengths = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 1, "max_k": 1}
            params = SDPAParams(
                tokens, tokens, tokens, is_causal=True, scale=1.0, causal_variant=LOWER_RIGHT, **lengths
            )
            with pytest.raises(ValueError, match="30000 sequences make 90000 in the kernel's grid"):
                efficient.forward(params)

    @pytest.mark.parametrize("band", BANDS[:-3], ids=str)
    @pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
    def test_seqused_k_of_a_dense_call_never_reads_what_is_not_used(
        self, cutlass: Cutlass, band: dict[str, Any], lengths: tuple[int, int]
    ) -> None:
        query, key, value = tensors(batch=3, heads=4, queries=lengths[0], keys=lengths[1])
        used = torch.tensor([lengths[1], 0, 3], dtype=torch.int32)
        beyond = torch.arange(lengths[1]) >= used[:, None]
        shifts = band.get("causal_variant") == LOWER_RIGHT and "window_size" in band
        seen = torch.zeros(3, 1, *lengths, dtype=torch.bool)
        for b, count in enumerate(used.tolist()):
            seen[b, 0, :, :count] = seen_by(lengths[0], count, **band)
        call = {"query": query, "key": key, "value": value, "seqused_k": used, **band}
        if shifts:
            call |= {name: call[name].detach() for name in ("query", "key", "value")}
        assert_same(call, seen)
        with torch.no_grad():
            clean = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, impl="emulated")
            for tensor in (key, value):
                tensor.masked_fill_(beyond[:, None, :, None], float("nan"))
            soiled = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, impl="emulated")
        assert torch.equal(clean, soiled)


class TestCudnn:
    """cudnn, the plugin's code on an emulated cuDNN."""

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("heads_first", [True, False])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_dense_calls_are_those_of_pytorch(
        self, emulated_cudnn: Cudnn, kv_heads: int, heads_first: bool, is_causal: bool
    ) -> None:
        query, key, value = tensors(
            heads=4, kv_heads=kv_heads, value_size=16, dtype=torch.float16, heads_first=heads_first
        )
        call = {"query": query, "key": key, "value": value, "is_causal": is_causal}
        assert_same(call, seen_by(5, 7, is_causal=is_causal), 4e-3)

    @pytest.mark.parametrize(("kind", "shape"), MASKS, ids=str)
    def test_masks_are_those_of_pytorch_and_rows_without_keys_are_zero(
        self, emulated_cudnn: Cudnn, kind: str, shape: tuple[int, ...]
    ) -> None:
        query, key, value = tensors(heads=4, kv_heads=2, dtype=torch.float16)
        mask = make_mask(kind, shape, torch.float16).detach()
        assert_same({"query": query, "key": key, "value": value, "attn_mask": mask}, seen_by(5, 7), 4e-3)

    def test_an_expanded_gradient_and_expanded_keys_get_memory_of_their_own(self, emulated_cudnn: Cudnn) -> None:
        query, key, value = tensors(dtype=torch.float16, heads=4, kv_heads=1)
        wide = [tensor.expand(-1, 4, -1, -1) for tensor in (key, value)]
        attnplug.scaled_dot_product_attention(query, *wide, impl="emulated").sum().backward()
        assert query.grad is not None and key.grad is not None and value.grad is not None
        torch.testing.assert_close(
            value.grad.sum(2), torch.full((2, 1, 8), 20.0, dtype=torch.float16), atol=0.2, rtol=0
        )

    def test_dropout_of_backward_is_that_of_forward(self, emulated_cudnn: Cudnn) -> None:
        query, key, value = tensors(dtype=torch.float16, queries=2)
        torch.manual_seed(3)
        out = attnplug.scaled_dot_product_attention(query, key, value, dropout_p=0.5, impl="emulated")
        (found,) = torch.autograd.grad(out, value, torch.ones_like(out))
        # out is linear in value, so its gradient gives it back
        again = (found.double() * value.detach().double()).sum((2, 3))
        torch.testing.assert_close(again, out.detach().double().sum((2, 3)), atol=2e-2, rtol=1e-2)

    def test_strict_determinism_is_an_error_of_its_own_in_a_backward_decided_before(
        self, emulated_cudnn: Cudnn
    ) -> None:
        query, key, value = tensors(dtype=torch.float16)
        out = attnplug.scaled_dot_product_attention(query, key, value, impl="emulated")
        try:
            torch.use_deterministic_algorithms(True)
            with pytest.raises(RuntimeError, match="no deterministic form"):
                out.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)


def on(device: str, value: Any) -> Any:
    """The same tensor without its values, elsewhere; the meta function indexes, which needs the device."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


class RealSchemas(TorchDispatchMode):
    """Lets the dispatcher check each call against its schema, then asks PyTorch's meta kernels for the result.

    PyTorch's meta function of the CUTLASS backward lacks two of the operator's arguments, and the two
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
            kwargs.pop("window_size", None)
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False))
            del given["out"]
            given["grad_out"] = given.pop("grad_out_")
            given = {name: on("meta", value) for name, value in given.items()}
            grads = torch._meta_registrations.meta__efficient_attention_backward(**given, **kwargs)
            return tuple(on("cuda", grad) for grad in grads)
        if name == "_cudnn_attention_forward":
            query, key, value, bias, *_ = args
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, args[8], *args[9:], **kwargs
            )
        if name == "_cudnn_attention_backward":
            return tuple(torch.empty_like(tensor) for tensor in args[1:4])
        return func(*args, **kwargs)


@pytest.fixture
def implementations() -> None:
    """Both implementations, installed or not."""
    for name, spec in SPECS.items():
        if name not in attnplug.list_flash_attention_impls():
            attnplug.register_impl(spec)


def fake_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn_version: int | None = 92000) -> None:
    """Describe a card that is not here, to the core and to the plugin."""
    monkeypatch.setattr("attnplug._requirements.compute_capability", lambda device: capability)
    monkeypatch.setattr(hardware, "compute_capability", lambda device: capability)
    monkeypatch.setattr(hardware, "cudnn_version", lambda: cudnn_version)


def fake_call(features: set[Feature], dtype: torch.dtype, size: int = 64, queries: int = 16, keys: int = 16) -> Any:
    """A call on a CUDA device that asks for these features: its tensors and its other arguments."""
    if features & {Feature.UPPER_LEFT, Feature.LOWER_RIGHT}:
        keys += 24
    kv_heads = 2 if Feature.GQA in features else 4
    value_size = 32 if Feature.VALUE_HEAD_SIZE in features else size
    options: dict[str, Any] = {"enable_gqa": Feature.GQA in features, "return_lse": Feature.LSE in features}
    if features & {Feature.CAUSAL, Feature.UPPER_LEFT, Feature.LOWER_RIGHT}:
        options["is_causal"] = True
    if Feature.WINDOW in features:
        options["window_size"] = (5, 0)
    if Feature.DROPOUT in features:
        options["dropout_p"] = 0.125

    def make(*shape: int, dtype: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)

    def integers(count: int) -> Tensor:
        return make(count, dtype=torch.int32, grad=False)

    if Feature.SEQUSED_K in features:
        options["seqused_k"] = integers(2)
    if Feature.VARLEN in features:
        inputs = [
            make(2 * queries, 4, size),
            make(2 * keys, kv_heads, size),
            make(2 * keys, kv_heads, value_size),
        ]
        options |= {"cu_seq_q": integers(3), "cu_seq_k": integers(3), "max_q": queries, "max_k": keys}
        return inputs, options
    inputs = [make(2, 4, queries, size), make(2, kv_heads, keys, size), make(2, kv_heads, keys, value_size)]
    if Feature.LOWER_RIGHT in features:
        options["causal_variant"] = LOWER_RIGHT
    if Feature.BOOLEAN_MASK in features:
        options["attn_mask"] = make(2, 1, queries, keys, dtype=torch.bool, grad=False)
    if features & {Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT}:
        options["attn_mask"] = make(2, 1, queries, keys, grad=Feature.MASK_GRADIENT in features)
    return inputs, options


def prepared(inputs: list[Tensor], options: dict[str, Any]) -> SDPAParams:
    """The same call as the core hands it to a kernel."""
    fields = {"causal_variant": LOWER_RIGHT} if "cu_seq_q" in options else {}
    fields |= {"dropout" if name == "dropout_p" else name: given for name, given in options.items()}
    return SDPAParams(*inputs, **fields, scale=inputs[0].shape[-1] ** -0.5)


def lse_shape(params: SDPAParams) -> tuple[int, ...]:
    shape = params.query.shape[:-1]
    return tuple(shape) if params.cu_seq_q is None else (shape[1], shape[0])


def pairs(name: str) -> list[Any]:
    """Every declared feature by itself and with each other one that a call can have together with it."""
    features = sorted(SPECS[name].capabilities.features, key=lambda item: item.name)
    impossible = [
        {Feature.UPPER_LEFT, Feature.LOWER_RIGHT},
        {Feature.UPPER_LEFT, Feature.VARLEN},
        {Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK},
        {Feature.BOOLEAN_MASK, Feature.MASK_GRADIENT},
        *({Feature.VARLEN, mask} for mask in (Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT)),
    ]
    return [
        pytest.param(name, {one, other}, id=f"{name}-{one.name}-{other.name}")
        for one, other in combinations_with_replacement(features, 2)
        if {one, other} not in impossible
    ]


MASK_FEATURES = {Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT}
DECLINED = {
    "efficient_cuda": [
        (
            {Feature.SEQUSED_K},
            MASK_FEATURES,
            "takes no attn_mask with variable-length sequences or seqused_k",
        ),
        ({Feature.DROPOUT}, {Feature.VARLEN, Feature.SEQUSED_K}, "draws other random numbers"),
        ({Feature.WINDOW}, {Feature.VARLEN}, "without the lower-right offset"),
    ],
    "cudnn": [(MASK_FEATURES, {Feature.CAUSAL, Feature.UPPER_LEFT}, "takes no attn_mask together with is_causal")],
}


class TestRealSchemas:
    @pytest.mark.parametrize(("name", "features"), pairs("efficient_cuda") + pairs("cudnn"))
    def test_every_pair_of_features_meets_the_schema_or_is_declined_with_a_reason(
        self, implementations: None, monkeypatch: pytest.MonkeyPatch, name: str, features: set[Feature]
    ) -> None:
        fake_card(monkeypatch, (9, 0))
        expected = [why for one, other, why in DECLINED[name] if features & one and features & other]
        with FakeTensorMode(), RealSchemas() as mode:
            inputs, options = fake_call(features, torch.float16)
            params = prepared(inputs, options)
            verdict = attnplug.can_use_impl(name, params)
            if expected:
                assert not verdict.accepted and expected[0] in " ".join(verdict.reasons)
                return
            assert verdict.accepted, verdict.reasons
            kernel = efficient if name == "efficient_cuda" else cudnn
            with torch.no_grad():
                out, lse, *saved = kernel.forward(params)
                grads = kernel.backward(params, torch.empty_like(out), None, out, lse, *saved)
            assert (out.device, out.shape) == (
                params.query.device,
                (*params.query.shape[:-1], params.value.shape[-1]),
            )
            assert lse.dtype == torch.float32 and lse.shape == lse_shape(params)
            promised = kernel.fake(params)
            for made, fake in zip((out, lse, *saved), promised, strict=True):
                assert (made.shape, made.stride(), made.dtype) == (fake.shape, fake.stride(), fake.dtype)
            wanting = [*inputs, params.attn_mask] if Feature.MASK_GRADIENT in features else inputs
            for tensor, grad in zip(wanting, grads, strict=False):
                if tensor is params.attn_mask:
                    grad = grad.sum_to_size(tensor.shape)
                assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)
        prefix = "_efficient" if name == "efficient_cuda" else "_cudnn"
        assert mode.seen == [f"{prefix}_attention_forward", f"{prefix}_attention_backward"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("size", [1, 5, 64, 100, 512])
    def test_efficient_cuda_brings_any_head_size_into_step(
        self, implementations: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
    ) -> None:
        fake_card(monkeypatch, (8, 0))
        with FakeTensorMode(), RealSchemas():
            inputs, options = fake_call({Feature.ADDITIVE_MASK}, dtype, size=size, keys=13)
            params = prepared(inputs, options)
            assert efficient.supports(params) == []
            with torch.no_grad():
                out, lse = efficient.forward(params)
                grads = efficient.backward(params, torch.empty_like(out), None, out, lse)
            assert [grad.shape for grad in grads[:3]] == [tensor.shape for tensor in inputs]

    def test_the_schemas_of_this_release_are_those_that_are_called(self) -> None:
        assert operators.changed(*operators._EXPECTED) == ()

    @pytest.mark.parametrize("name", sorted(operators._EXPECTED))
    def test_a_changed_schema_is_a_reason_that_names_operator_and_release(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        text = str(operators.find_schema(name))
        changes = {
            "does not exist": None,
            "'Tensor queries' as argument": text.replace("Tensor query,", "Tensor queries,"),
            "needs an argument that is not known here: 'Tensor sinks'": text.replace(") ->", ", Tensor sinks) ->", 1),
            "where 'float? scale' is expected": text.replace("float? scale=None", "float scale=1.0"),
            "returns 1 values": text.partition(" -> ")[0] + " -> Tensor",
        }
        for reason, changed in changes.items():
            schema = None if changed is None else torch._C.parse_schema(changed)
            monkeypatch.setattr(operators, "find_schema", lambda _, schema=schema: schema)
            (found,) = operators.changed.__wrapped__(name)
            assert reason in found and f"aten::{name}" in found and torch.__version__ in found
        appended = torch._C.parse_schema(text.replace(") ->", ", Tensor? sinks=None) ->", 1))
        monkeypatch.setattr(operators, "find_schema", lambda _: appended)
        assert operators.changed.__wrapped__(name) == ()


def reasons(name: str, *, grad: bool = False, **options: Any) -> tuple[str, ...]:
    """Each reason against a plain call, changed by `options`; none if it is accepted."""
    shape = {"batch": 2, "queries": 128, "keys": 128, "size": 64, "value_size": None, "dtype": torch.float16}
    shape |= {key: options.pop(key) for key in list(options) if key in shape}
    with FakeTensorMode():
        ends = [(shape["queries"], shape["size"]), (shape["keys"], shape["size"])]
        ends.append((shape["keys"], shape["value_size"] or shape["size"]))
        make = {"dtype": shape["dtype"], "device": "cuda", "requires_grad": grad}
        inputs = [torch.empty(shape["batch"], 4, *end, **make) for end in ends]
        if "attn_mask" in options:
            options["attn_mask"] = torch.empty(options["attn_mask"], dtype=torch.bool, device="cuda")
        if "seqused_k" in options:
            options["seqused_k"] = torch.empty(shape["batch"], dtype=torch.int32, device="cuda")
    return attnplug.can_use_impl(name, SDPAParams(*inputs, **options)).reasons


@pytest.mark.usefixtures("implementations")
class TestDecisions:
    @pytest.mark.parametrize("card", CARDS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_efficient_cuda_takes_half_and_single_precision_and_bfloat16_from_ampere_on(
        self, monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], dtype: torch.dtype
    ) -> None:
        fake_card(monkeypatch, card)
        found = reasons("efficient_cuda", dtype=dtype)
        if dtype == torch.float64:
            assert "does not support float64" in found[0]
        elif dtype == torch.bfloat16 and card < (8, 0):
            assert found
        else:
            assert found == ()

    @pytest.mark.parametrize("card", CARDS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_cudnn_takes_half_precision_from_ampere_on(
        self, monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], dtype: torch.dtype
    ) -> None:
        fake_card(monkeypatch, card)
        assert (reasons("cudnn", dtype=dtype) == ()) == (dtype != torch.float32 and card >= (8, 0))

    @pytest.mark.parametrize("name", sorted(SPECS))
    def test_cards_later_than_the_known_ones_are_declined(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        fake_card(monkeypatch, (13, 0))
        assert reasons(name) == ("needs compute capability 12.1 or earlier, found 13.0",)

    @pytest.mark.parametrize(
        ("card", "version", "sizes", "grad", "accepted"),
        [
            ((8, 0), 92300, (128, 128), True, True),
            ((8, 0), 92300, (136, 128), False, False),
            ((9, 0), 92000, (192, 128), True, True),
            ((9, 0), 91002, (192, 128), False, False),
            ((9, 0), 92000, (256, 256), False, False),
            ((9, 0), 92300, (256, 256), True, True),
            ((9, 0), 92300, (160, 160), False, True),
            ((9, 0), 92300, (160, 160), True, False),
            ((10, 0), 92300, (256, 256), True, True),
            ((12, 0), 92300, (192, 128), False, False),
            ((9, 0), 92000, (64, 60), False, False),
        ],
        ids=str,
    )
    def test_head_sizes_of_cudnn_follow_card_version_and_gradient(
        self,
        monkeypatch: pytest.MonkeyPatch,
        card: tuple[int, int],
        version: int,
        sizes: tuple[int, int],
        grad: bool,
        accepted: bool,
    ) -> None:
        fake_card(monkeypatch, card, version)
        assert (reasons("cudnn", size=sizes[0], value_size=sizes[1], grad=grad) == ()) == accepted

    @pytest.mark.parametrize(
        ("version", "options", "reason"),
        [
            (None, {}, "found none"),
            (80907, {}, "needs cuDNN 9.0 or later"),
            (91002, {"queries": 100}, "not a multiple of 128; found 9.10.2"),
            (91200, {"dropout": 0.5}, "no working dropout in cuDNN 9.12.0"),
            (92000, {"queries": 1}, "does not decode with cuDNN 9.20.0"),
            (92000, {"dropout": 0.1}, "in steps of 1/16"),
            (92000, {"keys": 1}, "a single key"),
            (92000, {"batch": 65536}, "at most 65535"),
            (92000, {"attn_mask": (128, 128), "is_causal": True}, "attn_mask together with is_causal"),
        ],
        ids=str,
    )
    def test_limits_of_cudnn_are_reasons(
        self, monkeypatch: pytest.MonkeyPatch, version: int | None, options: dict[str, Any], reason: str
    ) -> None:
        fake_card(monkeypatch, (10, 0), version)
        found = reasons("cudnn", **options)
        assert any(reason in one for one in found), found

    def test_gradients_with_a_mask_and_half_a_tile_of_keys_are_declined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_card(monkeypatch, (9, 0))
        half = {"keys": 192, "attn_mask": (128, 192)}
        assert reasons("cudnn", **half) == ()
        assert "may have NaN in its backward" in reasons("cudnn", grad=True, **half)[0]
        assert reasons("cudnn", grad=True, keys=256, attn_mask=(128, 256)) == ()

    def test_what_pytorch_refuses_to_give_to_cudnn_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_card(monkeypatch, (9, 0))
        monkeypatch.setattr(hardware, "cudnn_refuses", lambda params: "PyTorch does not give this call to cuDNN: so")
        assert reasons("cudnn") == ("PyTorch does not give this call to cuDNN: so",)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"window_size": (3, 2)}, "only up to the diagonal"),
            ({"window_size": (3, -1)}, "only up to the diagonal"),
            ({"dropout": 0.5}, "draws other random numbers"),
            ({"attn_mask": (128, 128)}, "takes no attn_mask"),
            (
                {"window_size": (3, 0), "causal_variant": LOWER_RIGHT, "grad": True},
                "without the lower-right offset",
            ),
        ],
        ids=str,
    )
    def test_limits_of_efficient_cuda_are_those_of_sequences(
        self, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
    ) -> None:
        fake_card(monkeypatch, (9, 0))
        (found,) = reasons("efficient_cuda", seqused_k=True, **options)
        assert reason in found
        assert reasons("efficient_cuda", **options) == ()


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnplug._requirements.compute_capability", lambda device: None)
    monkeypatch.setattr(hardware, "compute_capability", lambda device: None)


@pytest.mark.usefixtures("implementations", "no_card")
def test_explain_without_cuda_shows_both_with_their_reasons() -> None:
    on_cpu = torch.randn(1, 2, 4, 8)
    with FakeTensorMode():
        on_cuda = torch.empty(1, 2, 4, 8, device="cuda", dtype=torch.float16)
    for tensor, reason in (
        (on_cpu, "runs on cuda; the call is on cpu"),
        (on_cuda, "there is no such device here"),
    ):
        verdicts = {verdict.name: verdict for verdict in attnplug.explain(tensor, tensor, tensor).candidates}
        for name in ("efficient_cuda", "cudnn"):
            assert not verdicts[name].accepted and reason in " ".join(verdicts[name].reasons)


@pytest.mark.usefixtures("implementations")
def test_neither_runs_by_itself_before_there_are_measurements() -> None:
    records = {record.name: record.priority for record in attnplug.list_impls()}
    assert records["efficient_cuda"] < records["torch"] and records["cudnn"] < records["torch"]
