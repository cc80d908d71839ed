"""A wrong argument is named, with what came and what is accepted; and no kernel sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnplug

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 7, 8)
INT = torch.int32


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT)


DENSE = [
    ({"query": [1.0]}, TypeError, r"query: expected a torch.Tensor, got list"),
    ({"key": None}, TypeError, r"key: expected a torch.Tensor, got NoneType"),
    ({"query": Q.int()}, ValueError, r"query: dtype torch.int32 is not supported; accepted: torch.float16"),
    ({"key": K.double()}, ValueError, r"key: dtype torch.float64 differs from the query's, torch.float32"),
    ({"value": K.to("meta")}, ValueError, r"value: is on meta, the query on cpu"),
    ({"query": Q[0, 0, 0]}, ValueError, r"query: expected at least 2 dimensions .* got \(8,\)"),
    ({"key": K[..., :4]}, ValueError, r"key: its head size 4 must be the query's, 8"),
    ({"value": K[:, :, :5]}, ValueError, r"value: its length 5 must be the key's, 7"),
    ({"key": K[:, :2], "value": K[:, :2]}, ValueError, r"key: has 2 heads, the query 4; .* enable_gqa=True"),
    ({"key": K[:, :2]}, ValueError, r"value: has 4 heads, the key 2"),
    ({"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}, ValueError, r"query: its 4 heads are not a multiple"),
    ({"query": torch.randn(3, 4, 5, 8)}, ValueError, r"batch dimensions do not broadcast; got query \(3, 4, 5, 8\)"),
    ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, r"query: the head size is 0"),
    ({"attn_mask": "causal"}, TypeError, r"attn_mask: expected a torch.Tensor or None, got str"),
    ({"attn_mask": torch.ones(5, 7, dtype=INT)}, ValueError, r"attn_mask: dtype torch.int32 .* accepted: torch.bool"),
    ({"attn_mask": torch.ones(5, 6)}, ValueError, r"attn_mask: shape \(5, 6\) does not broadcast to .*\(2, 4, 5, 7\)"),
    ({"attn_mask": torch.ones(2, 7).bool()}, ValueError, r"\(2, 7\) does not broadcast to .* mask\[:, None, None, :\]"),
    ({"attn_mask": torch.ones(2, 5, 7)}, ValueError, r"\(2, 5, 7\) does not broadcast to .* mask\[:, None\]"),
    ({"attn_mask": torch.ones(5, 7, device="meta")}, ValueError, r"attn_mask: is on meta, the query on cpu"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a probability between 0 and 1, got 1.5"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: .* got -0.1"),
    ({"dropout_p": "half"}, TypeError, r"dropout_p: expected a number, got 'half'"),
    ({"dropout_p": [0.1]}, TypeError, r"dropout_p: expected a number"),
    ({"is_causal": 1}, TypeError, r"is_causal: expected a bool, got 1"),
    ({"enable_gqa": "yes"}, TypeError, r"enable_gqa: expected a bool, got 'yes'"),
    ({"return_lse": 1}, TypeError, r"return_lse: expected a bool, got 1"),
    ({"scale": "auto"}, TypeError, r"scale: expected a number, got 'auto'"),
    ({"scale": float("nan")}, ValueError, r"scale: expected a finite number, got nan"),
    ({"causal_variant": "lower_right"}, TypeError, r"causal_variant: expected CausalVariant"),
    ({"window_size": 3}, TypeError, r"window_size: expected two integers \(left, right\), got 3"),
    ({"window_size": (1.5, 0)}, TypeError, r"window_size: expected two integers"),
    ({"window_size": (True, 0)}, TypeError, r"window_size: expected two integers"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size: expected sides of -1 \(open\) or more"),
    ({"softcap": -1.0}, ValueError, r"softcap: expected 0 \(off\) or more, got -1.0"),
    ({"softcap": None}, TypeError, r"softcap: expected a number, got None"),
    ({"sinks": torch.randn(3)}, ValueError, r"sinks: expected shape \(4,\), one logit per query head, got \(3,\)"),
    ({"sinks": [0.0] * 4}, TypeError, r"sinks: expected a torch.Tensor, got list"),
    ({"alibi_slopes": torch.randn(2, 3)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\)"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, r"alibi_slopes: requires a gradient.*detach\(\)"),
    ({"alibi_slopes": torch.ones(4, dtype=INT)}, ValueError, r"alibi_slopes: dtype torch.int32 is not supported"),
    ({"seqused_k": ints(1)}, ValueError, r"seqused_k: expected shape \(2,\), got \(1,\)"),
    ({"seqused_k": torch.ones(2)}, ValueError, r"seqused_k: expected dtype torch.int32, got torch.float32"),
    ({"seqused_k": ints(3, 8)}, ValueError, r"seqused_k: expected values from 0 to 7, got 3 to 8"),
    ({"seqused_k": ints(-1, 5)}, ValueError, r"seqused_k: expected values from 0 to 7, got -1 to 5"),
    ({"impl": 3}, TypeError, r"impl: expected the name of an implementation or None, got 3"),
    ({"impl": ["torch"]}, TypeError, r"impl: expected the name"),
    ({"impl": "MATH"}, attnplug.UnknownImplementationError, r"'MATH' is a family: sdpa_kernel takes SDPBackend.MATH"),
    ({"impl": "sdpa"}, attnplug.UnknownImplementationError, r"implementation 'sdpa' is called 'torch' here\."),
    ({"impl": "FA2"}, attnplug.UnknownImplementationError, r"implementation 'FA2' is called 'flash_attn2' here\."),
    ({"impl": "flash"}, attnplug.UnknownImplementationError, r"may be the family SDPBackend.FLASH_ATTENTION, or 'fl"),
    ({"impl": "ATEN_MATH"}, attnplug.UnknownImplementationError, r"'ATEN_MATH'; did you mean 'aten_math'\?"),
    ({"impl": "aten_flush"}, attnplug.UnknownImplementationError, r"'aten_flush'; did you mean 'aten_flash'\?"),
]


# Whatever aten_flash does not take at all, right or wrong, it declines for that reason.
EXTENDED = {"softcap", "sinks", "alibi_slopes", "seqused_k", "window_size"}
CASES = [
    (impl, *case)
    for impl in (None, "aten_flash", "math_ref")
    for case in DENSE
    if impl != "aten_flash" or not EXTENDED & set(case[0])
]


@pytest.mark.parametrize(("impl", "wrong", "error", "message"), CASES, ids=[f"{case[0]}-{case[3]}" for case in CASES])
def test_wrong_argument_is_named(impl: str | None, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": Q, "key": K, "value": K, "impl": impl}
    attnplug.scaled_dot_product_attention(**arguments)  # a decision is cached: the hot path must notice too
    with pytest.raises(error, match=message):
        attnplug.scaled_dot_product_attention(**(arguments | wrong))
    if "impl" not in wrong:
        with pytest.raises(error, match=message):
            attnplug.explain(**(arguments | wrong))


VALID: dict[str, Any] = dict(
    query=torch.randn(8, 4, 8),
    key=torch.randn(9, 2, 8),
    value=torch.randn(9, 2, 8),
    cu_seq_q=ints(0, 5, 8),
    cu_seq_k=ints(0, 3, 9),
    max_q=5,
    max_k=6,
    enable_gqa=True,
    impl="math_ref",
)
PAGES: dict[str, Any] = VALID | dict(
    key=torch.randn(4, 3, 2, 8), value=torch.randn(4, 3, 2, 8), block_table=ints(0, 3, 1, 2).reshape(2, 2)
)
VARLEN = [
    (
        VALID,
        {"query": torch.randn(1, 8, 4, 8)},
        ValueError,
        r"query: expected 3 dimensions \(tokens, heads, head size\)",
    ),
    (VALID, {"value": torch.randn(8, 2, 8)}, ValueError, r"value: .* must agree with the key"),
    (VALID, {"enable_gqa": False}, ValueError, r"key: has 2 heads, the query 4"),
    (VALID, {"cu_seq_q": [0, 5, 8]}, TypeError, r"cu_seq_q: expected a torch.Tensor, got list"),
    (
        VALID,
        {"cu_seq_q": torch.tensor([0, 5, 8])},
        ValueError,
        r"cu_seq_q: expected dtype torch.int32, got torch.int64",
    ),
    (VALID, {"cu_seq_q": ints(1, 5, 8)}, ValueError, r"cu_seq_q: expected values that start at 0 and never decrease"),
    (VALID, {"cu_seq_q": ints(0, 5, 4)}, ValueError, r"cu_seq_q: expected values that start at 0 and never decrease"),
    (VALID, {"cu_seq_q": ints(0, 5, 9)}, ValueError, r"cu_seq_q: ends at 9, beyond the 8 tokens"),
    (VALID, {"cu_seq_k": ints(0, 9)}, ValueError, r"cu_seq_k: expected shape \(3,\), got \(2,\)"),
    (VALID, {"cu_seq_k": None}, TypeError, r"cu_seq_k: .* None needs both block_table and seqused_k"),
    (VALID, {"max_q": 4}, ValueError, r"max_q: is 4, but cu_seq_q has a sequence of 5"),
    (VALID, {"max_k": 5}, ValueError, r"max_k: is 5, but cu_seq_k has a sequence of 6"),
    (VALID, {"max_k": 5.0}, TypeError, r"max_k: expected an int"),
    (VALID, {"seqused_k": ints(4, 6)}, ValueError, r"seqused_k: exceeds the length that cu_seq_k gives"),
    (PAGES, {"key": torch.randn(9, 2, 8)}, ValueError, r"key: expected 4 dimensions \(pages, page size"),
    (PAGES, {"block_table": ints(0, 1)}, ValueError, r"block_table: expected shape \(2, any\)"),
    (PAGES, {"block_table": ints(0, 3, 1, 4).reshape(2, 2)}, ValueError, r"block_table: expected values from 0 to 3"),
    (PAGES, {"block_table": ints(0, 1).reshape(2, 1)}, ValueError, r"block_table: 1 pages of 3 keys cannot hold"),
]


@pytest.mark.parametrize(("base", "wrong", "error", "message"), VARLEN, ids=[case[3] for case in VARLEN])
def test_wrong_argument_of_a_variable_length_call_is_named(
    base: dict[str, Any], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    attnplug.varlen_attn(**base)
    with pytest.raises(error, match=message):
        attnplug.varlen_attn(**(base | wrong))


def test_what_pytorch_takes_in_silence_is_an_error_with_nothing_selected() -> None:
    """PyTorch's CPU kernel reads past the end of a value that is shorter than its key."""
    with pytest.raises(ValueError, match="value: its length 5"):
        attnplug.scaled_dot_product_attention(K, K, K[:, :, :5])
    with pytest.raises(ValueError, match="dropout_p"):
        attnplug.scaled_dot_product_attention(Q, K, K, None, 1.5)


def test_params_check_nothing_when_built_and_everything_when_used() -> None:
    params = attnplug.SDPAParams("not", "even", "tensors")
    with pytest.raises(TypeError, match="query: expected a torch.Tensor, got str"):
        attnplug.can_use_impl("torch", params)
    with pytest.raises(TypeError, match="params: expected SDPAParams, got dict"):
        attnplug.can_use_impl("torch", {})
    with pytest.raises(AttributeError):
        params.query = Q


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "two words"}, r"ImplSpec.name: 'two words' is not a name"),
        ({"name": "MATH"}, r"ImplSpec.name: 'MATH' is the name of a family of implementations; choose another"),
        ({"name": "Flash_Attention"}, r"ImplSpec.name: 'Flash_Attention' is the name of a family"),
        ({"kernel": "not a path"}, r"ImplSpec 'x'.kernel: 'not a path' is not a dotted path; write 'package.module'"),
        ({"backend": "FLASH"}, r"ImplSpec 'x'.backend: expected one of SDPBackend.MATH"),
        ({"backend": attnplug.SDPBackend.ERROR}, r"ImplSpec 'x'.backend: expected one of"),
        ({"priority": "high"}, r"ImplSpec 'x'.priority: expected an int, got 'high'"),
        ({"capabilities": {}}, r"ImplSpec 'x'.capabilities: expected Capabilities, got dict"),
        ({"requires": "triton"}, r"ImplSpec 'x'.requires: expected a collection of strings"),
    ],
)
def test_a_wrong_field_of_a_spec_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(attnplug.SpecError, match=message):
        attnplug.ImplSpec(**({"name": "x", "kernel": "a.b", "backend": None} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtypes": ["fp16"]}, r"Capabilities.dtypes: unknown dtype 'fp16'.* accepts float16"),
        ({"dtypes": "float16"}, r"Capabilities.dtypes: expected a collection"),
        ({"features": ["CAUSALL"]}, r"'CAUSALL' is not a Feature of attnplug .*; did you mean 'CAUSAL'\?"),
        ({"compute_capability": 8.0}, r"compute_capability: expected two integers such as \(8, 0\), got 8.0"),
        ({"head_sizes": ["64"]}, r"head_sizes: expected a range or integers"),
        ({"head_sizes": {0, 64}}, r"head_sizes: expected sizes of 1 and above"),
        ({"head_sizes": range(-8, 65, 8)}, r"head_sizes: expected sizes of 1 and above"),
        ({"devices": ["gpu"]}, r"devices: 'gpu' is not a type of device; write 'cuda'"),
        ({"devices": ["cuda:0"]}, r"devices: 'cuda:0' is not a type of device"),
    ],
)
def test_a_wrong_capability_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(attnplug.SpecError, match=message):
        attnplug.Capabilities(**fields)


def test_a_name_that_is_another_s_elsewhere_may_be_one_s_own() -> None:
    attnplug.register_impl(attnplug.ImplSpec(name="eager", kernel=lambda params: (params.query, None), backend=None))
    query = torch.ones(1, 1, 2, 4)
    assert attnplug.scaled_dot_product_attention(query, query, query, impl="eager") is not None
    with pytest.raises(attnplug.UnknownImplementationError, match=r"did you mean 'eager'\?"):
        attnplug.scaled_dot_product_attention(query, query, query, impl="eagre")
