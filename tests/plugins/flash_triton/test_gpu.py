"""What flash_triton does that only a GPU can show."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import attnplug
from attnplug import CausalVariant, Feature
from attnplug.testing import assert_right
from graphs import captured

pytest.importorskip("triton")
from attnplug_flash_triton import impl

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (64, 128), (239, 1), (799, 3), (113, 203), (384, 256), (1023, 1024), (1024, 1023), (2048, 2048)]
LONG = [(108, 256), (640, 128), (512, 256), (4096, 4096), (4224, 4224)]
"""For one dtype and few heads: the formulas in float64 hold all logits."""
DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def attend(*tensors: Tensor, **arguments: Any) -> Any:
    return attnplug.scaled_dot_product_attention(*tensors, enable_gqa=True, impl="flash_triton", **arguments)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


@pytest.mark.parametrize("lengths", SHAPES, ids=str)  # first: these have kernels in common, which one worker compiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 72, 128, 256])
def test_out_lse_and_gradients_are_right(dtype: torch.dtype, causal: bool, size: int, lengths: tuple[int, int]) -> None:
    check_right(dtype, causal, size, *lengths, heads=(4, 2))


@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_more_lengths_are_right(causal: bool, size: int, lengths: tuple[int, int]) -> None:
    check_right(torch.bfloat16, causal, size, *lengths, heads=(2, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("spread", [0.2, 0.75, 3.0, 1e4])
def test_logits_near_a_softcap_and_far_beyond_it_are_right(spread: float, size: int, causal: bool) -> None:
    query, key, value = (random(1, heads, 400, size, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    arguments = dict(query=query, key=key, value=value, is_causal=causal, softcap=20.0, scale=20 * spread / size**0.5)
    assert_right(arguments, *attend(**arguments, return_lse=True))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_nan_under_a_softcap_is_felt_in_its_row_alone(size: int) -> None:
    query, key, value = (random(1, 2, 400, size, seed=seed) for seed in range(3))
    query[0, 1, 70, 3] = torch.nan
    out = attend(query, key, value, softcap=20.0)
    expected = torch.zeros(1, 2, 400, dtype=torch.bool, device=DEVICE)
    expected[0, 1, 70] = True
    assert torch.equal(out.isnan().any(-1), expected)


def check_right(dtype: torch.dtype, causal: bool, size: int, queries: int, keys: int, heads: tuple[int, int]) -> None:
    """Assert that out, lse and all gradients of a call are right; `heads` of queries, and of keys."""
    shapes = (1, heads[0], queries, size), (1, heads[1], keys, size), (1, heads[1], keys, size)
    leaves = [random(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    weights = random(*shapes[0], seed=3).to(dtype)
    arguments = dict(zip(("query", "key", "value"), leaves, strict=True))
    arguments |= dict(is_causal=causal, causal_variant=CausalVariant.LOWER_RIGHT)
    out, lse = attend(**arguments, return_lse=True)
    gradients = dict(zip(arguments, torch.autograd.grad(out, leaves, weights), strict=False))
    assert_right(arguments, out.detach(), lse.detach(), gradients, grad_out=weights)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("zero", ["query", "key"])
def test_small_integers_are_exact(zero: str, size: int, dtype: torch.dtype, causal: bool) -> None:
    """Every product and every sum of these numbers is exact, so that one wrong bit in a product shows.

    Either queries or keys are 0, so that all logits are; values come as `v, -v`, so that the mean of an even number
    of them, and with it delta, is 0. A causal call's loss has the rows alone that see a power of two of keys.
    """
    length = 512
    generator = torch.Generator(DEVICE).manual_seed(size)
    numbers = [torch.randint(-1, 2, (2, 4, length, size), generator=generator, device=DEVICE) for _ in range(4)]
    query, key, value, weights = (tensor.to(dtype) for tensor in numbers)
    value[:, :, 1::2] = -value[:, :, ::2]
    if causal:  # a power of two of keys for each row in the loss
        rows = torch.arange(length, device=DEVICE) + 1
        weights[:, :, (rows & (rows - 1) != 0) | (rows == 1)] = 0
    (query if zero == "query" else key).zero_()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attend(*leaves, is_causal=causal, scale=0.5)
    grads = torch.autograd.grad(out, leaves, weights)

    visible = torch.ones(length, length, dtype=torch.float64, device=DEVICE)
    p = visible.tril() if causal else visible
    p = p / p.sum(-1, keepdim=True)
    ref_out = p @ value.double()
    grad_p = weights.double() @ value.double().mT
    grad_logits = 0.5 * p * (grad_p - (ref_out * weights.double()).sum(-1, keepdim=True))
    refs = (grad_logits @ key.double(), grad_logits.mT @ query.double(), p.mT @ weights.double())
    in_loss = weights.any(-1).any(0).any(0)
    assert torch.equal(out[:, :, in_loss], ref_out[:, :, in_loss].to(dtype))
    for grad, ref in zip(grads, refs, strict=True):
        assert torch.equal(grad, ref.to(dtype))


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Assert that out and the gradients of query, key and value of two runs have equal bits.

    Where the kernels add the query's gradient up in no fixed order, it may differ by one unit in the last place of its
    largest element; what lost or read something else would differ by more.
    """
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        if number == 1 and Feature.DETERMINISTIC in impl.lacks(first.device, first.dtype):
            assert (first - second).abs().max() <= torch.finfo(first.dtype).eps * first.abs().max()
        else:
            assert torch.equal(first, second)


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_give_equal_bits(dtype: torch.dtype) -> None:
    tensors = [random(2, 8, 1000, 64, dtype=dtype, seed=seed).requires_grad_() for seed in range(3)]
    runs = []
    for _ in range(3):
        out = attend(*tensors, is_causal=True)
        runs.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for run in runs[1:]:
        if torch.are_deterministic_algorithms_enabled():
            assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
        assert_same(run, runs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_may_be_the_first_in_its_thread_that_reaches_cuda(dtype: torch.dtype) -> None:
    """Memory out of PyTorch's cache needs no CUDA context, and a tensor map does, of one call and of the next."""
    made = [[random(1, 2, 256, 64, dtype=dtype, seed=seed) for seed in range(3 * n, 3 * n + 3)] for n in range(4)]
    attend(*made[0])
    for tensors in made[1:]:
        with ThreadPoolExecutor(1) as thread:
            out = thread.submit(attend, *tensors).result()
        assert_right(dict(zip(("query", "key", "value"), tensors, strict=True)), out)


def test_a_captured_graph_of_forward_and_backward_replays() -> None:
    tensors = [random(1, 4, 256, 64, seed=seed).requires_grad_() for seed in range(3)]
    grad_out = random(1, 4, 256, 64, seed=3)

    def run() -> tuple[Tensor, ...]:
        out = attend(*tensors, is_causal=True)
        return out, *torch.autograd.grad(out, tensors, grad_out)

    graph, results = captured(run, warmups=1)
    with torch.no_grad():
        for seed, tensor in enumerate(tensors):
            tensor.copy_(random(1, 4, 256, 64, seed=seed + 5))
    graph.replay()
    assert_same(results, run())


def test_a_replayed_graph_draws_new_dropout() -> None:
    tensors = [random(1, 4, 256, 64, seed=seed) for seed in range(3)]
    attend(*tensors, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*tensors, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.fixture
def needs_memory() -> Iterator[Callable[[int], None]]:
    """Skips where so much is not free; what a test took is given back, and one process at a time takes so much."""

    def needs(gibibytes: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < gibibytes * 2**30:
            pytest.skip(f"needs {gibibytes} GiB of free memory, there are {free / 2**30:.0f}")

    with FileLock(Path(tempfile.gettempdir()) / "attnplug_tests_of_memory.lock"):
        yield needs
        torch.cuda.empty_cache()


def large(*shape: int) -> Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    assert tensor.numel() > 2**31
    return tensor


def test_keys_beyond_32_bits_are_right(needs_memory: Callable[[int], None]) -> None:
    """The last head, which lies beyond 2**31 elements, must equal a call of its own, gradients too."""
    needs_memory(30)
    query, key = random(1, 132, 64, 128), large(1, 132, 2**17, 128)
    weights = random(1, 132, 64, 128, seed=1)
    results = []
    for heads in (slice(None), slice(-1, None)):
        leaves = [tensor[:, heads].detach().requires_grad_() for tensor in (query, key, key)]
        out = attend(*leaves)
        results.append([out[:, -1:], *(grad[:, -1:] for grad in torch.autograd.grad(out, leaves, weights[:, heads]))])
    assert_same(*results)


def test_queries_beyond_32_bits_are_right(needs_memory: Callable[[int], None]) -> None:
    needs_memory(30)
    query, key = large(1, 132, 2**17, 128), random(1, 132, 64, 128)
    results = []
    for heads in (slice(None), slice(-1, None)):
        leaves = [tensor[:, heads].detach().requires_grad_() for tensor in (query, key, key)]
        out = attend(*leaves)
        results.append([out[:, -1:], *(grad[:, -1:] for grad in torch.autograd.grad(out, leaves, out))])
    assert_same(*results)


def test_tokens_and_masks_beyond_32_bits_are_right(needs_memory: Callable[[int], None]) -> None:
    """Rows of a mask that start beyond 2**31 elements, and rows of tokens laid out (tokens, heads, size)."""
    needs_memory(24)
    mask = torch.rand(1, 1, 2**16 + 64, 2**15, device="cuda") < 0.5
    assert mask.numel() > 2**31
    query, key = random(1, 1, 2**16 + 64, 32), random(1, 1, 2**15, 32)
    out = attend(query, key, key, attn_mask=mask)
    assert torch.equal(out[:, :, -64:], attend(query[:, :, -64:], key, key, attn_mask=mask[:, :, -64:]))
    del mask, out
    key = large(1, 2**18 + 64, 64, 128).transpose(1, 2)
    query = random(1, 64, 64, 128)
    windowed = dict(causal_variant=CausalVariant.LOWER_RIGHT, window_size=(64, -1))
    out = attend(query, key, key, **windowed)
    assert torch.equal(out, attend(query, *[key[:, :, -256:]] * 2, **windowed))


def test_forward_and_backward_compile_without_a_graph_break() -> None:
    tensors = [random(1, 4, 256, 64, seed=seed).requires_grad_() for seed in range(3)]
    out = torch.compile(attend, fullgraph=True)(*tensors, is_causal=True)
    ref = attend(*tensors, is_causal=True)
    runs = [(each.detach(), *torch.autograd.grad(each.sum(), tensors)) for each in (out, ref)]
    assert_same(*runs)


def test_calls_that_were_made_before_are_right_whatever_changes_between_them() -> None:
    """Launches are kept by layout, alignment and device, and go to the stream that is current; twice each, in turns."""
    query, key, value, weights = (random(2, 4, 300, 64, seed=seed) for seed in range(4))
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = query.new_zeros(query.numel() + 1)[1:].view(query.shape).copy_(query)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for given in (query, strided, shifted) * 2:
        for stream in streams:
            with torch.cuda.stream(stream):
                leaves = [tensor.detach().requires_grad_() for tensor in (given, key, value)]
                out = attend(*leaves, is_causal=True)
                grads = torch.autograd.grad(out, leaves, weights)
                stream.synchronize()
            arguments = dict(query=given, key=key, value=value, is_causal=True)
            assert_right(arguments, out.detach(), None, dict(zip(arguments, grads, strict=False)), grad_out=weights)


class Sequences:
    """Packed calls of as many tokens each, whose lengths, which the GPU alone reads, are others each time.

    Query, key and value lie side by side, and there are tokens behind the last sequence.
    """

    LENGTHS = ((130, 0, 257, 40, 1), (1, 257, 0, 100, 70), (257, 3, 3, 3, 200))
    TOKENS = 500

    def __init__(self, size: int) -> None:
        self.starts = torch.zeros(6, dtype=torch.int32, device=DEVICE)
        self.tokens = [random(self.TOKENS, 3, 4, size, seed=seed).requires_grad_() for seed in range(2)]
        self.grads = random(self.TOKENS, 4, size, seed=3)

    def begin(self, number: int) -> int:
        """Set the lengths of a call, and return the number of the tokens that it has."""
        lengths = torch.tensor([0, *self.LENGTHS[number % 3]]).cumsum(0, dtype=torch.int32)
        self.starts.copy_(lengths)
        return int(lengths[-1])

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = attnplug.varlen_attn(
            *tokens.unbind(1), self.starts, self.starts, 257, 257, is_causal=True, impl="flash_triton"
        )
        return out, *torch.autograd.grad(out, [tokens], self.grads)

    def assert_right(self, last: int, tokens: Tensor, out: Tensor, grad: Tensor) -> None:
        assert not out[last:].any() and not grad[last:].any()
        names, given = ("query", "key", "value"), tokens.detach()[:last].unbind(1)
        lengths = dict(cu_seq_q=self.starts, cu_seq_k=self.starts, max_q=257, max_k=257, is_causal=True)
        arguments, grads = dict(zip(names, given, strict=True)), grad[:last].unbind(1)
        gradients = dict(zip(names, grads, strict=True))
        assert_right(arguments | lengths, out.detach()[:last], gradients=gradients, grad_out=self.grads[:last])


def spoil_free_memory() -> None:
    """Leave NaN in memory that a call is given next."""
    torch.full((2**24,), torch.nan, device=DEVICE)
    for size in (2**8, 2**12, 2**16, 2**18):
        torch.full((4, size), torch.nan, device=DEVICE)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_packed_calls_like_one_before_are_right_on_every_stream(size: int) -> None:
    """Twice each on two streams that wait for nothing but what they must, then alone in a memory full of NaN."""
    sequences = Sequences(size)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for number in range(3):
        last, found = sequences.begin(number), []
        torch.cuda.synchronize()
        for stream, tokens in list(zip(streams, sequences.tokens, strict=True)) * 2:
            with torch.cuda.stream(stream):
                found.append((tokens, *sequences.run(tokens)))
        torch.cuda.synchronize()
        for tokens, out, grad in found:
            sequences.assert_right(last, tokens, out, grad)
        spoil_free_memory()
        sequences.assert_right(last, sequences.tokens[0], *sequences.run(sequences.tokens[0]))


@pytest.mark.parametrize("size", [64, 256])
def test_a_captured_graph_of_packed_calls_reads_the_lengths_of_each_replay(size: int) -> None:
    """Also where the calls are the first of their sizes, and what is kept of them is used outside afterwards."""
    small, sequences = Sequences(size), Sequences(size)
    small.begin(0)
    part = small.tokens[0].detach()[:450].requires_grad_()
    small.grads = small.grads[:450]
    small.run(part)  # compiles kernels, which no capture allows
    tokens, graph = sequences.tokens[0], torch.cuda.CUDAGraph()
    sequences.begin(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = sequences.run(tokens)
    for number in range(3):
        last = sequences.begin(number)
        graph.replay()
        sequences.assert_right(last, tokens, *results)
        sequences.assert_right(last, tokens, *sequences.run(tokens))
    del graph, results
    torch.cuda.empty_cache()
    sequences.assert_right(last, tokens, *sequences.run(tokens))


def test_compiled_packed_calls_replay_with_new_lengths() -> None:
    sequences = Sequences(64)

    def attended(tokens: Tensor, starts: Tensor) -> Tensor:
        query, key, value = (tokens * 1.0).unbind(1)
        return attnplug.varlen_attn(query, key, value, starts, starts, 257, 257, is_causal=True, impl="flash_triton")

    compiled = torch.compile(attended, mode="reduce-overhead", fullgraph=True)
    for number in range(5):  # the first warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        tokens, last = sequences.tokens[number % 2], sequences.begin(number)
        out = compiled(tokens, sequences.starts)
        (grad,) = torch.autograd.grad(out, [tokens], sequences.grads)
        sequences.assert_right(last, tokens, out, grad)


def test_graphed_callables_train() -> None:
    tensors = [random(1, 4, 300, 64, seed=seed).requires_grad_() for seed in range(3)]
    grad_out = random(1, 4, 300, 64, seed=3)

    def layer(*tensors: Tensor) -> Tensor:
        return attend(*tensors, is_causal=True)

    graphed = torch.cuda.make_graphed_callables(layer, tuple(tensors))
    for seed in range(3):
        with torch.no_grad():
            for number, tensor in enumerate(tensors):
                tensor.copy_(random(1, 4, 300, 64, seed=seed + number))
        runs = []
        for function in (graphed, layer):
            out = function(*tensors)
            runs.append([each.clone() for each in (out, *torch.autograd.grad(out, tensors, grad_out))])
        assert_same(*runs)


@torch.no_grad()
@pytest.mark.parametrize("pages", [False, True], ids=["cache", "pages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_step_of_a_decode_loop_is_right(dtype: torch.dtype, pages: bool) -> None:
    """Of three layers each; at other lengths keys are split among other numbers of programs."""
    query = random(2, 8, 1, 64, dtype=dtype)
    cache = [random(2, 2, 2048, 64, dtype=dtype, seed=seed) for seed in (1, 2)]
    ones = torch.arange(3, dtype=torch.int32, device=DEVICE)
    for length in (*range(1, 20), *range(250, 262), *range(1020, 1030), 2047, 2048, 5):
        keys = [tensor[:, :, :length] for tensor in cache]
        for _ in range(3):
            if pages:  # the second sequence has half as many keys
                used = torch.tensor([length, -(-length // 2)], dtype=torch.int32, device=DEVICE)
                table = torch.arange(-(-length // 16), dtype=torch.int32, device=DEVICE)
                table = torch.stack([table, table + 128])
                paged = [each.transpose(1, 2).reshape(2 * 128, 16, 2, 64) for each in cache]
                arguments: dict[str, Any] = dict(cu_seq_q=ones, cu_seq_k=None, max_q=1, max_k=length)
                arguments |= dict(seqused_k=used, block_table=table, enable_gqa=True)
                out = attnplug.varlen_attn(query[:, :, 0], *paged, **arguments, impl="flash_triton")
                parts = [slice(0, length), slice(0, -(-length // 2))]
                wholes = [[each[i : i + 1, :, part] for each in cache] for i, part in enumerate(parts)]
                found = out[:, :, None]
            else:
                found = attend(query, *keys)
                wholes = [[each[i : i + 1] for each in keys] for i in range(2)]
        for i, (key, value) in enumerate(wholes):
            arguments = dict(query=query[i : i + 1], key=key, value=value, enable_gqa=True)
            assert_right(arguments, found[i : i + 1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_runs_where_its_tensors_are() -> None:
    expected = attend(*(random(1, 2, 64, 64, seed=seed) for seed in range(3)))
    for _ in range(2):
        for device in (0, 1):
            out = attend(*(random(1, 2, 64, 64, seed=seed).to(f"cuda:{device}") for seed in range(3)))
            assert torch.equal(out.to(expected.device), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_run_where_their_tensors_are_whatever_device_is_current() -> None:
    """In threads, too, that have not met either device."""

    def trained(device: int) -> list[Tensor]:
        tensors = [random(1, 2, 256, 64, seed=seed).to(f"cuda:{device}").requires_grad_() for seed in range(3)]
        out = attend(*tensors, is_causal=True)
        return [each.to(DEVICE) for each in (out, *torch.autograd.grad(out, tensors, torch.ones_like(out)))]

    expected = trained(0)
    for _ in range(3):
        for device in (0, 1):
            assert_same(trained(device), expected)
            with ThreadPoolExecutor(1) as thread:
                assert_same(thread.submit(trained, device).result(), expected)
