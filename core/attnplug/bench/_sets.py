"""Cases by name: grids that others publish figures for, and the shapes of models that people run.

Shapes of models come from their published configurations; the comment at each says which fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from attnplug._errors import did_you_mean
from attnplug.bench._cases import Case
from attnplug.bench._errors import BenchError
from attnplug.bench._validate import device_type

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def default_device() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """Return what models mostly run in there: bfloat16 on a GPU, float32 on a CPU."""
    return "float32" if device_type(device) == "cpu" else "bfloat16"


def default_set(device: str) -> str:
    """Return the set that gives a useful answer in about a minute on `device`."""
    return "laptop" if device_type(device) == "cpu" else "gpu"


def case_set(name: str, *, device: str | None = None, dtype: str | None = None) -> list[Case]:
    """Return the cases of a named set.

    Args:
        name: one of `attnplug.bench.SETS`.
        device: by default a GPU if there is one, else the CPU.
        dtype: by default bfloat16 on a GPU, float32 on a CPU.

    Raises:
        BenchError: there is no such set.

    Examples:
        >>> from attnplug.bench import case_set
        >>> [case.name for case in case_set("llama-3-8b")]
        ['prefill 512', 'prefill 2048', 'prefill 8192', 'decode 512', 'decode 2048', 'decode 8192', 'decode B16 8192']
    """
    if not isinstance(name, str) or name not in SETS:
        raise BenchError(
            f"set: there is no {name!r}{did_you_mean(str(name), SETS) or ';'} the sets are {', '.join(SETS)}"
        )
    device = default_device() if device is None else device
    dtype = default_dtype(device) if dtype is None else dtype
    return [case.but(device=device, dtype=dtype) for case in SETS[name]()]


def _laptop() -> Iterator[Case]:
    """a minute on a laptop's CPU: a sweep of lengths, and one or two cases of each kind of model"""
    for length in (128, 256, 512, 1024):
        yield Case(heads=8, queries=length, head_size=64, causal=True, backward=True)
    yield _named("minilm", next(_minilm()))
    yield _named("llama-3-8b", _llama_prefill(256))
    yield _named("llama-3-8b", _llama_decode(2048))
    yield _named("sdxl", Case(name="cross 1024", heads=20, queries=1024, keys=77))
    yield _named("whisper", Case(name="decoder 448", heads=20, queries=448, causal=True))


def _gpu() -> Iterator[Case]:
    """two minutes on a GPU: sweeps of lengths, and one or two cases of each kind of model"""
    for length in (1024, 4096, 16384):
        yield _tokens(length, 128, causal=True)
    yield _named("llama-3-8b", _llama_prefill(8192))
    yield _named("llama-3-8b", _llama_decode(8192, batch=16))
    yield _named("gpt2", next(_gpt2()))
    yield _named("sdxl", next(_sdxl()))
    yield _named("whisper", next(_whisper()))


def _pytorch() -> Iterator[Case]:
    """the grid of PyTorch's benchmarks/transformer/sdpa.py"""
    for batch, length, causal in product((1, 8, 16), (128, 256, 512, 1024, 8192), (True, False)):
        yield Case(batch=batch, heads=16, queries=length, head_size=2048 // 16, causal=causal, backward=True)


def _llama() -> Iterator[Case]:
    """Llama-3-8B: prefill and decode, with grouped queries"""
    # config.json: 32 num_attention_heads, 8 num_key_value_heads, hidden_size 4096, max_position_embeddings 8192
    for length in (512, 2048, 8192):
        yield _llama_prefill(length)
    for length in (512, 2048, 8192):
        yield _llama_decode(length)
    yield _llama_decode(8192, batch=16)


def _llama_prefill(length: int) -> Case:
    return Case(name=f"prefill {length}", heads=32, kv_heads=8, queries=length, head_size=128, causal=True)


def _llama_decode(length: int, batch: int = 1) -> Case:
    name = f"decode {length}" if batch == 1 else f"decode B{batch} {length}"
    return Case(name=name, batch=batch, heads=32, kv_heads=8, queries=1, keys=length, head_size=128)


def _gpt2() -> Iterator[Case]:
    """GPT-2: a training step and a prefill"""
    # config.json: n_head 12, n_embd 768, n_ctx 1024
    yield Case(name="train 1024", heads=12, queries=1024, head_size=64, causal=True, backward=True)
    yield Case(name="prefill 1024", heads=12, queries=1024, head_size=64, causal=True)


def _minilm() -> Iterator[Case]:
    """all-MiniLM-L6-v2: sentences in a padded batch, with and without its mask"""
    # config.json: num_attention_heads 12, hidden_size 384; sentence_bert_config.json: max_seq_length 256
    yield Case(name="B8 256 masked", batch=8, heads=12, queries=256, head_size=32, mask="boolean")
    yield Case(name="B8 256", batch=8, heads=12, queries=256, head_size=32)
    yield Case(name="B64 32 masked", batch=64, heads=12, queries=32, head_size=32, mask="boolean")


def _sdxl() -> Iterator[Case]:
    """Stable Diffusion XL, 1024 x 1024, with guidance: self and cross attention at both resolutions"""
    # sd_xl_base.yaml: model_channels 320, channel_mult [1, 2, 4], attention_resolutions [4, 2],
    # num_head_channels 64; latents of 128 x 128, 77 tokens of text, a batch of 2 for guidance.
    for heads, length in ((10, 64 * 64), (20, 32 * 32)):
        yield Case(name=f"self {length}", batch=2, heads=heads, queries=length, head_size=64)
    for heads, length in ((10, 64 * 64), (20, 32 * 32)):
        yield Case(name=f"cross {length}", batch=2, heads=heads, queries=length, keys=77, head_size=64)


def _wan() -> Iterator[Case]:
    """Wan2.1 T2V 1.3B, a video transformer, 81 frames of 832 x 480: self and cross attention"""
    # wan_t2v_1_3B.py: dim 1536, num_heads 12, patch_size (1, 2, 2), vae_stride (4, 8, 8), text_len 512; that is
    # (1 + 80 / 4) * (480 / 16) * (832 / 16) tokens.
    length = 21 * 30 * 52
    yield Case(name=f"self {length}", heads=12, queries=length, head_size=128)
    yield Case(name=f"cross {length}", heads=12, queries=length, keys=512, head_size=128)


def _whisper() -> Iterator[Case]:
    """Whisper large-v3: encoder, and the decoder's prompt, step and cross attention"""
    # config.json: encoder_attention_heads 20, d_model 1280, max_source_positions 1500, max_target_positions 448
    yield Case(name="encoder 1500", heads=20, queries=1500, head_size=64)
    yield Case(name="decoder 448", heads=20, queries=448, head_size=64, causal=True)
    yield Case(name="step 448", heads=20, queries=1, keys=448, head_size=64)
    yield Case(name="cross 1500", heads=20, queries=1, keys=1500, head_size=64)


def _kernels() -> Iterator[Case]:
    """for kernel authors: 16k tokens, 2048 channels, head sizes 64 to 256, causal and not; and decoding"""
    # The grid of the FlashAttention papers, so that figures can be held against published ones.
    for head_size, causal, length in product((64, 128, 256), (False, True), LENGTHS):
        yield _tokens(length, head_size, causal)
    for batch, length in product((1, 16), (2048, 8192)):
        yield _llama_decode(length, batch)


def _tokens(length: int, head_size: int, causal: bool) -> Case:
    """16k tokens in sequences of `length`, 2048 channels in heads of `head_size`."""
    heads = 2048 // head_size
    return Case(
        batch=LENGTHS[-1] // length, heads=heads, queries=length, head_size=head_size, causal=causal, backward=True
    )


def _named(model: str, case: Case) -> Case:
    return case.but(name=f"{model} {case.name}")


SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "laptop": _laptop,
    "gpu": _gpu,
    "pytorch": _pytorch,
    "llama-3-8b": _llama,
    "gpt2": _gpt2,
    "minilm": _minilm,
    "sdxl": _sdxl,
    "wan-2.1": _wan,
    "whisper": _whisper,
    "kernels": _kernels,
}
"""The named sets: for each name a function that yields its cases, whose docstring says what they are."""
