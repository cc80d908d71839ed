"""What `efficient_cuda` and `cudnn` accept and decline, asked about GPUs and versions of cuDNN that are not here."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
import foreign_cudnn
from attnplug import SDPAParams
from cuda_calls import GPUS, LOWER_RIGHT, SPECS, install_cudnn, install_sequences, register_both

Capability = tuple[int, int]


@pytest.fixture(autouse=True)
def _both_and_a_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    register_both()
    install_cudnn(monkeypatch, 92000)


def reasons(name: str, gpu: Capability | None = (9, 0), *, grad: bool = False, **options: Any) -> tuple[str, ...]:
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
    return attnplug.can_use_impl(name, SDPAParams(*inputs, **options), compute_capability=gpu).reasons


def reasons_of_sequences(
    gpu: Capability | None = (9, 0), *, grad: bool = False, tokens: int = 512, size: int = 64, **options: Any
) -> tuple[str, ...]:
    """Each reason of `cudnn` against a plain call of `varlen_attn`, changed by `options`."""
    value_size = options.pop("value_size", size)
    with FakeTensorMode():
        make = {"dtype": torch.float16, "device": "cuda", "requires_grad": grad}
        inputs = [torch.empty(tokens, 4, end, **make) for end in (size, size, value_size)]
        starts = torch.empty(3, dtype=torch.int32, device="cuda")
        if "seqused_k" in options:
            options["seqused_k"] = torch.empty(2, dtype=torch.int32, device="cuda")
    lengths = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 128, "max_k": 128, "causal_variant": LOWER_RIGHT}
    params = SDPAParams(*inputs, **(lengths | options))
    return attnplug.can_use_impl("cudnn", params, compute_capability=gpu).reasons


class TestEfficientCuda:
    @pytest.mark.parametrize("gpu", GPUS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_takes_half_and_single_precision_and_bfloat16_from_ampere_on(
        self, gpu: Capability, dtype: torch.dtype
    ) -> None:
        found = reasons("efficient_cuda", gpu, dtype=dtype)
        if dtype == torch.float64:
            assert "does not support float64" in found[0]
        elif dtype == torch.bfloat16 and gpu < (8, 0):
            assert found == (f"needs compute capability 8.0 or later, found {gpu[0]}.{gpu[1]}",)
        else:
            assert found == ()

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"window_size": (3, 2)}, "only up to the diagonal"),
            ({"window_size": (3, -1)}, "only up to the diagonal"),
            ({"dropout": 0.5}, "draws other random numbers"),
            ({"attn_mask": (128, 128)}, "takes no attn_mask"),
            ({"window_size": (3, 0), "causal_variant": LOWER_RIGHT, "grad": True}, "without the lower-right offset"),
        ],
        ids=str,
    )
    def test_limits_are_those_of_sequences(self, options: dict[str, Any], reason: str) -> None:
        (found,) = reasons("efficient_cuda", seqused_k=True, **options)
        assert reason in found
        assert reasons("efficient_cuda", **options) == ()


class TestCudnn:
    @pytest.mark.parametrize("gpu", GPUS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_takes_half_precision_from_ampere_on(self, gpu: Capability, dtype: torch.dtype) -> None:
        assert (reasons("cudnn", gpu, dtype=dtype) == ()) == (dtype != torch.float32 and gpu >= (8, 0))

    @pytest.mark.parametrize(
        ("gpu", "version", "sizes", "grad", "accepted"),
        [
            ((8, 0), 92300, (128, 128), True, True),
            ((8, 0), 92300, (136, 128), False, False),
            ((9, 0), 92000, (192, 128), True, True),
            ((9, 0), 91002, (192, 128), False, True),
            ((9, 0), 92000, (256, 256), False, True),
            ((9, 0), 90900, (256, 256), False, False),
            ((9, 0), 92300, (256, 256), True, True),
            ((9, 0), 92300, (160, 160), False, True),
            ((9, 0), 92300, (160, 160), True, False),
            ((10, 0), 92300, (256, 256), True, True),
            ((12, 0), 92300, (192, 128), False, False),
            ((9, 0), 92000, (64, 60), False, False),
        ],
        ids=str,
    )
    def test_head_sizes_follow_gpu_version_and_gradient(
        self,
        monkeypatch: pytest.MonkeyPatch,
        gpu: Capability,
        version: int,
        sizes: tuple[int, int],
        grad: bool,
        accepted: bool,
    ) -> None:
        install_cudnn(monkeypatch, version)
        assert (reasons("cudnn", gpu, size=sizes[0], value_size=sizes[1], grad=grad) == ()) == accepted

    @pytest.mark.parametrize(
        ("version", "options", "reason"),
        [
            (None, {}, "is built without"),
            (80907, {}, "needs cuDNN 9.0 or later"),
            (91002, {"queries": 100}, "not a multiple of 128; found 9.10.2"),
            (92500, {"dropout": 0.5}, "does not support dropout"),
            (92000, {"queries": 1}, "does not decode with cuDNN 9.20.0"),
            (92000, {"keys": 1}, "a single key"),
            (92000, {"batch": 65536}, "at most 65535"),
            (92000, {"seqused_k": True}, "does not support seqused_k"),
        ],
        ids=str,
    )
    def test_limits_are_reasons(
        self, monkeypatch: pytest.MonkeyPatch, version: int | None, options: dict[str, Any], reason: str
    ) -> None:
        install_cudnn(monkeypatch, version)
        found = reasons("cudnn", (10, 0), **options)
        assert any(reason in one for one in found), found

    def test_gradients_with_a_mask_and_half_a_tile_of_keys_are_declined(self) -> None:
        half = {"keys": 192, "attn_mask": (128, 192)}
        assert reasons("cudnn", **half) == ()
        assert "may have NaN in its backward" in reasons("cudnn", grad=True, **half)[0]
        assert reasons("cudnn", grad=True, keys=256, attn_mask=(128, 256)) == ()
        assert "may have NaN in its backward" in reasons("cudnn", grad=True, keys=192, window_size=(9, 0))[0]
        assert reasons("cudnn", grad=True, keys=192, is_causal=True) == ()

    def test_strict_determinism_declines_gradients_only(self) -> None:
        try:
            torch.use_deterministic_algorithms(True)
            assert "has no deterministic backward" in reasons("cudnn", grad=True)[0]
            assert reasons("cudnn") == reasons("efficient_cuda", grad=True) == ()
        finally:
            torch.use_deterministic_algorithms(False)


class TestCudnnSequences:
    @pytest.fixture(autouse=True)
    def _of_2_15(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_cudnn(monkeypatch, 92500)
        install_sequences(monkeypatch)

    @pytest.mark.parametrize("gpu", GPUS, ids=str)
    def test_are_taken_on_hopper_and_the_first_blackwell(self, gpu: Capability) -> None:
        assert (reasons_of_sequences(gpu) == ()) == (gpu[0] in (9, 10))

    def test_need_the_release_of_pytorch_that_finished_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_sequences(monkeypatch, present=False)
        (found,) = reasons_of_sequences()
        assert found.startswith("takes variable-length sequences from PyTorch 2.15 on") and torch.__version__ in found

    def test_need_the_cudnn_that_takes_empty_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_cudnn(monkeypatch, 92401)
        assert reasons_of_sequences() == ("needs cuDNN 9.25 for sequences, of which some may be empty; found 9.24.1",)

    @pytest.mark.parametrize(
        ("gpu", "sizes", "grad", "accepted"),
        [
            ((9, 0), (128, 128), True, True),
            ((9, 0), (192, 128), False, False),
            ((10, 0), (192, 128), True, True),
            ((10, 0), (256, 256), False, True),
            ((10, 0), (256, 256), True, False),
            ((10, 0), (160, 160), False, False),
        ],
        ids=str,
    )
    def test_head_sizes_are_those_of_varlen_attn(
        self, gpu: Capability, sizes: tuple[int, int], grad: bool, accepted: bool
    ) -> None:
        assert (reasons_of_sequences(gpu, size=sizes[0], value_size=sizes[1], grad=grad) == ()) == accepted

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"max_q": 1}, "a single query each"),
            ({"dropout": 0.5}, "does not support dropout"),
            ({"is_causal": True, "grad": True}, "only from the upper left"),
            ({"tokens": 2**24}, "with 32 bits"),
            ({"seqused_k": True}, "does not support seqused_k"),
            ({"window_size": (3, 0)}, "does not support window_size"),
            ({"value_size": 60}, "is not a multiple of 8"),
        ],
        ids=str,
    )
    def test_limits_are_reasons(self, options: dict[str, Any], reason: str) -> None:
        (found,) = reasons_of_sequences(**options)
        assert reason in found

    def test_causal_masks_without_gradients_are_taken(self) -> None:
        assert reasons_of_sequences(is_causal=True) == ()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_gpus_later_than_the_known_ones_are_declined(name: str) -> None:
    assert reasons(name, (13, 0)) == ("needs compute capability 12.1 or earlier, found 13.0",)


def a_gpu_is_here(monkeypatch: pytest.MonkeyPatch, gpu: Capability) -> None:
    """Let PyTorch find one GPU, and refuse every call to cuDNN."""

    def refuse(call: Any, debug: bool) -> bool:
        warnings.warn("cuDNN is tired. (Triggered internally at somewhere)", stacklevel=1)
        return False

    # To make a fake tensor PyTorch 2.11 first makes a real one, on a GPU that it finds.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", refuse)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *fields: fields)


def test_a_cudnn_that_pytorch_complains_of_is_held_against_the_call_by_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign_cudnn.install(monkeypatch)
    assert reasons("cudnn") == ()
    foreign_cudnn.install(monkeypatch, 80900)
    assert reasons("cudnn")[0].endswith("found 8.9.0")


def test_what_pytorch_refuses_to_give_to_cudnn_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu_is_here(monkeypatch, (9, 0))
    said = f"PyTorch {torch.__version__} does not give this call to cuDNN: cuDNN is tired."
    assert reasons("cudnn", None) == (said,)


def test_pytorch_is_not_asked_about_a_gpu_other_than_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu_is_here(monkeypatch, (8, 0))
    assert reasons("cudnn", None) != () and reasons("cudnn", (9, 0)) == ()


def fake_query(device: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 2, 128, 64, device=device, dtype=torch.float16)


@pytest.mark.parametrize(
    ("device", "reason"), [("cpu", "runs on cuda; the call is on cpu"), ("cuda", "there is no such device here")]
)
def test_explain_without_cuda_shows_both_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch, device: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    query = fake_query(device)
    verdicts = {verdict.name: verdict for verdict in attnplug.explain(query, query, query).candidates}
    for name in SPECS:
        assert not verdicts[name].accepted and reason in " ".join(verdicts[name].reasons)


def test_explain_answers_for_a_gpu_that_is_not_here() -> None:
    query = fake_query("cuda")
    told = attnplug.explain(query, query, query, compute_capability=(9, 0))
    verdicts = {verdict.name: verdict for verdict in told.candidates}
    assert told.chosen == "torch"
    for name in (*SPECS, "aten_flash", "aten_math"):
        assert verdicts[name].accepted and verdicts[name].reasons == ("torch comes first",)
    asked = attnplug.explain(query, query, query, return_lse=True, compute_capability=(7, 5), impl="cudnn")
    (reason,) = next(verdict.reasons for verdict in asked.candidates if verdict.name == "cudnn")
    assert asked.chosen is None and reason == "needs compute capability 8.0 or later, found 7.5"


def test_neither_runs_by_itself_before_there_are_measurements() -> None:
    records = {record.name: record.priority for record in attnplug.list_impls()}
    assert records["efficient_cuda"] < records["torch"] and records["cudnn"] < records["torch"]
    query = fake_query("cuda")
    for gpu in GPUS:
        assert attnplug.explain(query, query, query, compute_capability=gpu).chosen == "torch"
