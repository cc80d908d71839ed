"""What each adapter declines, asked about GPUs that are not here: every limit is a reason before anything runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from adapters_on_standins import register, standin
from attnplug import Feature

attnplug_adapters = pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from attnplug_adapters import specs
from attnplug_adapters.flash_attn2 import FlashAttn2
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.flashinfer import FlashInfer
from attnplug_adapters.sage_attention import SageAttention
from attnplug_adapters.xformers import XFormers

Gpu = tuple[int, int]
LOWER_RIGHT = attnplug.CausalVariant.LOWER_RIGHT
ADAPTERS = {
    "flash_attn2": (FlashAttn2, "flash_attn2", specs.FLASH_ATTN2),
    "flash_attn3": (FlashAttn3, "flash_attn3", specs.FLASH_ATTN3),
    "wheel": (FlashAttn3, "flash_attn3", specs.FLASH_ATTN3_WHEEL),
    "flash_attn4": (FlashAttn4, "flash_attn4", specs.FLASH_ATTN4),
    "sage1": (SageAttention, "sage1", specs.SAGE_ATTENTION1),
    "sage2": (SageAttention, "sage2", specs.SAGE_ATTENTION),
    "sage2_of_july": (SageAttention, "sage2", specs.SAGE_ATTENTION),
    "xformers": (XFormers, "xformers", specs.XFORMERS),
    "flashinfer": (FlashInfer, "flashinfer", specs.FLASHINFER),
}


def without_its_last_function(library: str) -> Any:
    """A build from before 2025-08-04, which has no mask in the function that came with hidden keys."""
    older = type(sys)(f"libraries.{library}_older")
    vars(older).update({name: each for name, each in vars(standin(library)).items() if not name.startswith("__")})
    older.sageattn_qk_int8_pv_fp16_triton = lambda q, k, v, is_causal=False: None
    return older


@pytest.fixture(autouse=True)
def _adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    built_without = {"FP16": True, "LOCAL": True, "PAGEDKV": True, "BACKWARD": True, "HDIM64": False}
    config = type(sys)("flash_attn_config")
    config.CONFIG = {"build_flags": {f"FLASHATTENTION_DISABLE_{part}": off for part, off in built_without.items()}}
    for name, (adapter, library, capabilities) in ADAPTERS.items():
        kernel = adapter(standin(library) if name != "sage2_of_july" else without_its_last_function(library))
        if name == "wheel":
            monkeypatch.setitem(sys.modules, f"{kernel.name}_config", config)
            assert kernel.left_out == {"FP16", "LOCAL", "PAGEDKV", "BACKWARD"}
            monkeypatch.delitem(sys.modules, f"{kernel.name}_config")
        attnplug.register_impl(
            attnplug.ImplSpec(name=f"on.{name}", kernel=kernel, backend=None, capabilities=capabilities)
        )


def reasons(name: str, gpu: Gpu, *, grad: bool = False, **options: Any) -> str:
    """Each reason against a plain call, changed by `options`; empty if it is accepted."""
    shape = {"size": 64, "value_size": None, "queries": 128, "keys": 128, "dtype": torch.bfloat16, "page": None}
    shape |= {"packed": False}
    shape |= {key: options.pop(key) for key in list(options) if key in shape}
    with FakeTensorMode():
        make = {"dtype": shape["dtype"], "device": "cuda", "requires_grad": grad}
        ends = [(shape["queries"], shape["size"]), (shape["keys"], shape["size"])]
        ends.append((shape["keys"], shape["value_size"] or shape["size"]))
        tensors = [torch.empty(2, 4, *end, **make) for end in ends]
        if shape["page"]:
            tensors = [torch.empty(8, 4, shape["size"], **make)]
            tensors += [torch.empty(6, shape["page"], 4, shape["size"], **make)] * 2
            options |= {name: torch.empty(3, dtype=torch.int32, device="cuda") for name in ("cu_seq_q", "cu_seq_k")}
            options |= {"block_table": torch.empty(2, 3, dtype=torch.int32, device="cuda"), "max_q": 4, "max_k": 8}
            options["causal_variant"] = LOWER_RIGHT
        if shape["packed"]:
            tensors = [torch.empty(8, 4, shape["size"], **make) for _ in range(3)]
            options |= {name: torch.empty(3, dtype=torch.int32, device="cuda") for name in ("cu_seq_q", "cu_seq_k")}
            options |= {"max_q": 4, "max_k": 8, "causal_variant": LOWER_RIGHT}
        if options.get("attn_mask"):
            options["attn_mask"] = torch.empty(128, 128, dtype=torch.bool, device="cuda")
        if options.get("seqused_k"):
            options["seqused_k"] = torch.empty(2, dtype=torch.int32, device="cuda")
        if options.get("sinks"):
            options["sinks"] = torch.empty(4, device="cuda", requires_grad=grad)
    params = attnplug.SDPAParams(*tensors, **options)
    return "; ".join(attnplug.can_use_impl(f"on.{name}", params, compute_capability=gpu).reasons)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("flash_attn2", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("flash_attn3", [(9, 0)]),
        ("flash_attn4", [(9, 0), (10, 0), (11, 0), (12, 0)]),
        ("sage1", [(8, 0), (8, 6), (8, 9), (9, 0)]),
        ("sage2", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]),
        ("xformers", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("flashinfer", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    ],
)
def test_gpus(name: str, accepted: list[Gpu]) -> None:
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0)]
    found = [gpu for gpu in gpus if not reasons(name, gpu)]
    assert [gpu for gpu in found if gpu != (11, 0) or gpu in accepted] == accepted
    assert "compute capability" in reasons(name, (7, 5))


@pytest.mark.parametrize(
    ("name", "gpu", "call", "reason"),
    [
        ("flash_attn2", (9, 0), {"dtype": torch.float32}, "does not support float32"),
        ("flash_attn2", (9, 0), {"size": 264}, "head size 264 is above 256"),
        ("flash_attn2", (9, 0), {"value_size": 32}, "value head size other than the query's"),
        ("flash_attn2", (9, 0), {"attn_mask": True}, "a boolean attn_mask"),
        ("flash_attn2", (9, 0), {"is_causal": True, "keys": 64}, "upper-left alignment"),
        ("flash_attn2", (9, 0), {"softcap": 5.0, "dropout": 0.1}, "softcap together with dropout"),
        ("flash_attn2", (9, 0), {"page": 128}, "pages of a multiple of 256 keys, got 128"),
        ("flash_attn2", (9, 0), {"page": 256, "grad": True}, "no backward with block_table"),
        ("flash_attn2", (9, 0), {"seqused_k": True, "grad": True}, "no backward with seqused_k"),
        ("flash_attn2", (8, 9), {"size": 256, "dropout": 0.1, "grad": True}, "no backward for head size 256"),
        ("flash_attn3", (9, 0), {"dropout": 0.1}, "does not support dropout"),
        ("flash_attn3", (9, 0), {"attn_mask": True}, "a boolean attn_mask"),
        ("flash_attn3", (9, 0), {"size": 128, "value_size": 64}, "head sizes 128 and 64 together"),
        ("wheel", (9, 0), {"dtype": torch.float16}, "does not support float16"),
        ("wheel", (9, 0), {"window_size": (5, 0)}, "does not support window_size"),
        ("flash_attn4", (10, 0), {"size": 192}, "no kernel for head sizes 192 and 192"),
        ("flash_attn4", (10, 0), {"size": 256, "softcap": 5.0}, "takes no softcap with head size 256"),
        ("flash_attn4", (12, 0), {"page": 16}, "no paged keys on compute capability 12.x"),
        ("flash_attn4", (12, 0), {"sinks": True, "grad": True}, "no backward with sinks"),
        ("sage2", (10, 0), {}, "has kernels for compute capability 8.0, 8.6"),
        ("sage2", (9, 0), {"attn_mask": True}, "a boolean attn_mask"),
        ("sage2", (9, 0), {"is_causal": True, "keys": 64}, "upper-left alignment"),
        ("sage2", (9, 0), {"grad": True}, "has no backward"),
        ("sage2", (9, 0), {"size": 160}, "head size 160 is above 128"),
        ("sage1", (9, 0), {"return_lse": True}, "does not support return_lse"),
        ("sage1", (9, 0), {"keys": 100}, "missing from the last block of 64: 28 beside 100, for head size 64"),
        ("sage1", (9, 0), {"keys": 6209, "size": 128}, "missing from the last block of 64: 63 beside 6209"),
        ("sage1", (9, 0), {"packed": True}, "missing from the last block of 64 in packed sequences"),
        ("sage1", (9, 0), {"packed": True, "size": 72}, "version 2, built from source since 2025-08-05"),
        ("sage2_of_july", (8, 6), {"keys": 100, "size": 72}, "missing from the last block of 64: 28 beside 100"),
        ("sage2_of_july", (8, 6), {"keys": 9999, "return_lse": True}, "missing from the last block of 64: 49"),
        ("sage2_of_july", (9, 0), {"packed": True}, "missing from the last block of 64 in packed sequences"),
        ("sage2", (9, 0), {"packed": True, "is_causal": True}, "lower-right alignment"),
        ("sage2", (9, 0), {"packed": True, "return_lse": True}, "gives no lse of packed sequences"),
        ("xformers", (9, 0), {"dropout": 0.1}, "does not support dropout"),
        ("xformers", (10, 0), {"dtype": torch.float32}, "no kernel for float32 above compute capability 9.0"),
        ("xformers", (10, 0), {"attn_mask": True}, "no kernel for attn_mask above compute capability 9.0"),
        ("xformers", (12, 0), {"size": 512}, "no kernel for head sizes above 256 above compute capability 9.0"),
        ("xformers", (12, 0), {"is_causal": True, "keys": 64}, "no kernel for upper-left alignment above"),
        ("xformers", (9, 0), {"packed": True, "window_size": (5, 2)}, "only up to the diagonal"),
        ("xformers", (9, 0), {"seqused_k": True, "attn_mask": True}, "no attn_mask together with seqused_k"),
        ("xformers", (7, 5), {"packed": True, "window_size": (5, 0), "grad": True, "dtype": torch.float16},
         "no backward for windows of packed sequences and compute capability below 8.0"),
        ("xformers", (9, 0), {"softcap": 5.0}, "does not support softcap"),
        ("flashinfer", (9, 0), {"size": 80}, "head size 80 is not one of 64, 128, 256"),
        ("flashinfer", (9, 0), {"window_size": (5, 2)}, "only to the left of the diagonal"),
        ("flashinfer", (9, 0), {"grad": True}, "has no backward"),
    ],
    ids=str,
)  # fmt: skip
def test_limits_are_reasons(name: str, gpu: Gpu, call: dict[str, Any], reason: str) -> None:
    assert reason in reasons(name, gpu, **call)


@pytest.mark.parametrize(
    ("name", "gpu", "call"),
    [
        ("flash_attn2", (8, 0), {"size": 72, "grad": True, "dropout": 0.1}),
        ("flash_attn2", (9, 0), {"is_causal": True, "keys": 64, "causal_variant": LOWER_RIGHT}),
        ("flash_attn3", (9, 0), {"size": 192, "value_size": 128}),
        ("flash_attn4", (10, 0), {"size": 192, "value_size": 128, "grad": True}),
        ("flash_attn4", (9, 0), {"sinks": True, "window_size": (64, 0), "grad": True}),
        ("xformers", (8, 0), {"attn_mask": True, "grad": True, "dtype": torch.float32}),
        ("xformers", (7, 0), {"window_size": (5, 2), "grad": True, "dtype": torch.float16}),
        ("xformers", (10, 0), {"packed": True, "window_size": (5, 0), "grad": True}),
        ("xformers", (8, 6), {"size": 512, "is_causal": True, "dtype": torch.float16}),
        ("sage2", (8, 9), {"packed": True}),
        ("sage2", (8, 6), {"keys": 100, "return_lse": True}),
        ("sage2_of_july", (9, 0), {"keys": 100, "return_lse": True}),
        ("sage2_of_july", (8, 6), {"is_causal": True, "queries": 100, "keys": 100}),
        ("sage1", (9, 0), {"keys": 100, "size": 72}),
        ("sage1", (9, 0), {"keys": 6400, "size": 128}),
        ("sage1", (9, 0), {"keys": 6240 - 3}),
        ("sage1", (9, 0), {"is_causal": True, "queries": 100, "keys": 100}),
        ("flashinfer", (9, 0), {"page": 16, "softcap": 30.0}),
        ("sage2", (8, 9), {"is_causal": True, "return_lse": True}),
    ],
    ids=str,
)
def test_what_the_libraries_do_is_accepted(name: str, gpu: Gpu, call: dict[str, Any]) -> None:
    assert reasons(name, gpu, **call) == ""


def test_only_cutlass_kernels_of_xformers_are_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        asked = {"grad": True, "window_size": (5, 0)}
        assert reasons("xformers", (9, 0), **asked) == "has no deterministic backward for windows"
        assert "for packed sequences" in reasons("xformers", (9, 0), packed=True, **asked)
        assert "for this GPU" in reasons("xformers", (10, 0), grad=True)
        assert reasons("xformers", (9, 0), dtype=torch.float32, **asked) == reasons("xformers", (9, 0), grad=True) == ""
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_build_without_a_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {f"FLASHATTENTION_DISABLE_{part}": True for part in ("SOFTCAP", "BACKWARD", "LOCAL", "HDIM256")}
    flags |= {"FLASH_ATTENTION_DISABLE_HDIMDIFF192": True, "FLASHATTENTION_DISABLE_FP8": False}
    config = type(sys)("libraries.flash_attn3_config")
    config.CONFIG = {"build_flags": flags}
    monkeypatch.setitem(sys.modules, config.__name__, config)
    assert "this build has no softcap" in reasons("flash_attn3", (9, 0), softcap=5.0)
    assert "this build has no backward" in reasons("flash_attn3", (9, 0), grad=True)
    assert "this build has no window_size" in reasons("flash_attn3", (9, 0), window_size=(5, 5))
    assert "this build has no kernel for another head size of values" in reasons(
        "flash_attn3", (9, 0), size=192, value_size=128
    )
    assert reasons("flash_attn3", (9, 0), size=64, value_size=256) == ""
    assert "no head size above 192, got 256" in reasons("flash_attn3", (9, 0), size=256)
    assert reasons("flash_attn3", (9, 0), is_causal=True) == ""


@pytest.mark.parametrize("name", ["flash_attn3", "flash_attn4"])
def test_a_pass_over_values_is_told_where_there_is_one(name: str) -> None:
    register(ADAPTERS[name][0](standin(name)), ADAPTERS[name][2], "told")
    query, starts = torch.randn(8, 2, 16).half(), torch.tensor([0, 3, 8], dtype=torch.int32)
    dense = query.view(1, 8, 2, 16).transpose(1, 2)

    def told(*tensors: torch.Tensor, **options: Any) -> tuple[str, ...]:
        found = {each.name: each for each in attnplug.explain(*tensors, **options).candidates}["told"]
        assert found.accepted, found.reasons
        return found.notes

    packed = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 5, "max_k": 5}
    assert told(dense, dense, dense) == ()
    (note,) = told(dense, dense, dense, seqused_k=starts[1:2])
    assert told(query, query, query, **packed) == (note,)
    assert note.startswith("copies value with 0 where no key is")
    for size, noted in ((16, 0), (256, 1)):
        pool = torch.randn(4, size, 2, 16).half()
        table = {"cu_seq_k": None, "seqused_k": starts[:2], "block_table": torch.tensor([[0], [2]], dtype=torch.int32)}
        assert len(told(query, pool, pool, **packed | table)) == noted


@pytest.mark.parametrize(("name", "times"), [("sage1", 3), ("sage2", 1), ("sage2_of_july", 3)])
def test_lengths_count_only_for_releases_of_sage_attention_that_count_missing_keys(
    name: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they count, a call is decided anew, and compiled anew, for each length."""
    asked: list[int] = []
    supports = SageAttention.supports
    monkeypatch.setattr(
        SageAttention, "supports", lambda self, params: asked.append(params.key.shape[2]) or supports(self, params)
    )
    library = standin(name[:5])
    if name == "sage2_of_july":
        library = without_its_last_function("sage2")
    register(SageAttention(library), ADAPTERS[name][2])
    for length in (64, 128, 64, 192):
        query, key = torch.randn(1, 2, 5, 64).half(), torch.randn(1, 2, length, 64).half()
        attnplug.scaled_dot_product_attention(query, key, key, impl="emulated")
    assert len(asked) == times


def test_sage_attention_is_quantized_and_stays_behind() -> None:
    specs_by_name = {spec.name: spec for spec in attnplug_adapters.attnplug_register_impls()}
    assert [name for name, spec in specs_by_name.items() if spec.capabilities.quantized] == ["sage_attention"]


PAGES = Path(__file__).parents[3] / "docs" / "adapters"
WORDS = {
    Feature.BOOLEAN_MASK: "(?<!causal )masks",
    Feature.UPPER_LEFT: "causal masks of unequal lengths|both alignments",
    Feature.WINDOW: "windows",
    Feature.SOFTCAP: "softcap",
    Feature.SINKS: "sinks",
    Feature.ALIBI: "ALiBi",
    Feature.DROPOUT: "dropout",
    Feature.VALUE_HEAD_SIZE: "another head size of values",
    Feature.LSE: "`lse`",
    Feature.LSE_GRADIENT: "through `lse`|gradients,",
    Feature.VARLEN: "packed sequences",
    Feature.SEQUSED_K: "`seqused_k`",
    Feature.PAGED: "[Pp]ages",
}


@pytest.mark.parametrize("spec", specs.all_specs(), ids=lambda spec: spec.name)
def test_the_page_says_what_the_capabilities_say(spec: attnplug.ImplSpec) -> None:
    page = (PAGES / f"{spec.name}.md").read_text()
    assert spec.install in page
    found = re.search(r"\*\*Good for\*\*: (.*?)\*\*Lacks\*\*: (.*?)\n\n", page, re.S)
    assert found is not None
    has, lacks = (" ".join(text.split()) for text in found.groups())
    part = next(each for each in spec.capabilities.alternatives if "cuda" in (each.devices or ()))
    for feature, words in WORDS.items():
        assert re.search(words, has if feature in part.features else lacks), feature
    sizes, (major, minor) = part.head_sizes, part.compute_capability or (0, 0)
    assert sizes is not None and str(max(sizes)) in has + lacks
    assert re.search(rf"compute capability {major}\.[{minor}x]", has)


def test_every_name_is_listed_with_what_would_bring_it() -> None:
    records = {record.name: record for record in attnplug.list_impls()}
    names = {spec.name for spec in attnplug_adapters.attnplug_register_impls()}
    assert names == {
        "flash_attn2",
        "flash_attn3",
        "flash_attn4",
        "sage_attention",
        "xformers",
        "flashinfer",
        "flex",
        "hub",
    }
    for name in names & set(records):
        record = records[name]
        assert record.status != "broken"
        if "not installed" in record.reason:
            assert "pip install" in record.reason
