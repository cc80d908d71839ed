"""`attnplug explain` asks about a call that is only described: nothing runs, nothing is allocated."""

from __future__ import annotations

import pytest
import torch

import attnplug
from attnplug import Capabilities, Feature

F = Feature
PACKED = "--query 16,8,64 --varlen 5,3,8"
ASKS = {
    "": set(),
    "--causal": {F.CAUSAL},
    "--causal --key 1,8,256,64": {F.CAUSAL, F.UPPER_LEFT},
    "--causal --key 1,8,256,64 --causal-variant lower-right": {F.CAUSAL, F.LOWER_RIGHT},
    "--causal-variant lower-right": set(),
    "--window 16,0": {F.WINDOW},
    "--window -1,0": {F.WINDOW},
    "--window -1,-1": set(),
    "--mask bool": {F.BOOLEAN_MASK},
    "--mask float": {F.ADDITIVE_MASK},
    "--mask float:1,8,1,128": {F.ADDITIVE_MASK},
    "--mask float --mask-grad": {F.ADDITIVE_MASK, F.MASK_GRADIENT},
    "--dropout 0.1": {F.DROPOUT},
    "--scale -1e-3": set(),
    "--gqa": set(),
    "--gqa --key 1,2,128,64": {F.GQA},
    "--value 1,8,128,32": {F.VALUE_HEAD_SIZE},
    "--softcap 30": {F.SOFTCAP},
    "--sinks": {F.SINKS},
    "--sinks-grad": {F.SINKS, F.SINKS_GRADIENT},
    "--alibi": {F.ALIBI},
    "--alibi --key 1,8,256,64": {F.ALIBI, F.UPPER_LEFT},
    "--lse": {F.LSE},
    "--seqused": {F.SEQUSED_K},
    "--causal --seqused": {F.CAUSAL, F.SEQUSED_K, F.UPPER_LEFT},
    "--query 2,3,8,128,64 --seqused --alibi --sinks": {F.SEQUSED_K, F.ALIBI, F.SINKS, F.UPPER_LEFT},
    "--query 8,128,64 --mask bool:8,128,128": {F.BOOLEAN_MASK},
    PACKED: {F.VARLEN},
    f"{PACKED} --causal": {F.VARLEN, F.CAUSAL, F.LOWER_RIGHT},
    f"{PACKED} --causal-variant lower-right": {F.VARLEN},
    f"{PACKED} --seqused": {F.VARLEN, F.SEQUSED_K},
    f"{PACKED} --paged 4": {F.VARLEN, F.PAGED},
    f"{PACKED} --paged 4 --seqused": {F.VARLEN, F.PAGED, F.SEQUSED_K},
    f"{PACKED} --key 16,2,64 --gqa --paged 4": {F.VARLEN, F.GQA, F.PAGED},
    "--query 3,8,64 --varlen 1,1,1:7,8,9": {F.VARLEN},
}


def words(options: str) -> list[str]:
    """Split `options`, with a query of (1, 8, 128, 64) if they name none."""
    return (options if "--query" in options else f"--query 1,8,128,64 {options}").split()


def verdict(data: dict, name: str) -> dict:
    return next(candidate for candidate in data["candidates"] if candidate["name"] == name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", ASKS)
def test_options_ask_for_exactly_these_features(cli, register, options, device):
    register(name="bare")
    data = cli("explain", *words(options), "--device", device, "--impl", "bare", "--json").data
    assert verdict(data, "bare")["reasons"] == [f"does not support {f.value}" for f in F if f in ASKS[options]]


def test_grad_asks_for_a_backward(cli, register):
    register(name="bare")
    done = cli("explain", *words("--grad --impl bare --json"))
    assert done.status == 1
    assert verdict(done.data, "bare")["reasons"] == ["has no backward, and a gradient is needed"]


@pytest.mark.parametrize("options", ["--grad --mask float --mask-grad", "--query 2,3,8,128,64 --grad"])
def test_gradients_can_be_asked_about_on_a_device_that_is_not_here(shell, options):
    """In a fresh interpreter: where autograd records anything of such a tensor, PyTorch ends the process."""
    done = shell("explain", *words(options), "--device", "cuda", "--impl", "torch")
    assert (done.status, done.err) == (0, "") and done.out.endswith("torch would run.\n")


@pytest.mark.parametrize(
    "options", ["", "--causal", "--softcap 30", "--mask bool:1,1,128,128", "--lse --dtype float64"]
)
def test_the_table_is_that_of_explain_with_real_tensors(cli, options):
    query = torch.zeros(1, 8, 128, 64, dtype=torch.float64 if "float64" in options else torch.float32)
    call = {
        "--causal": {"is_causal": True},
        "--softcap": {"softcap": 30.0},
        "--mask": {"attn_mask": torch.ones(1, 1, 128, 128, dtype=torch.bool)},
        "--lse": {"return_lse": True},
    }.get(options.partition(" ")[0], {})
    explanation = attnplug.explain(query, query, query, **call)
    done = cli("explain", *words(options))
    told = str(explanation).partition("Nearest miss: ")[0].split()  # which names --impl here
    assert done.out.split()[: len(told)] == told
    assert done.status == (0 if explanation.chosen else 1)


def test_text_and_json_tell_the_same(cli):
    options = words("--scope FLASH_ATTENTION,MATH --lse")
    text, data = cli("explain", *options).out.splitlines(), cli("explain", *options, "--json").data
    assert text[-1] == f"{data['chosen']} would run."
    assert len(text) == len(data["candidates"]) + 3
    for line, candidate in zip(text[1:], data["candidates"], strict=False):
        answer = "runs" if candidate["name"] == data["chosen"] else "could" if candidate["accepted"] else "no"
        assert line.split()[:3] == [candidate["name"], candidate["family"] or "-", answer]
        assert line.endswith("; ".join(candidate["reasons"]))


def test_nothing_runs_and_nothing_is_allocated(cli, register):
    register(name="bare")
    done = cli("explain", "--query", "64,128,1000000,256", "--mask", "bool", "--impl", "bare")
    assert done.status == 1
    done = cli("explain", "--query", "64,128,1000000,256", "--impl", "bare")
    assert done.status == 0 and done.out.endswith("bare would run.\n")


def test_a_device_that_is_not_here_can_be_asked_about(cli, register):
    register(name="on_cpu", capabilities=Capabilities(devices=("cpu",)))
    register(name="on_gpu", capabilities=Capabilities(devices=("cuda",)))
    options = words("--device cuda:1 --dtype bfloat16 --scope on_cpu,on_gpu --json")
    done = cli("explain", *options)
    assert done.data["chosen"] == "on_gpu"
    assert verdict(done.data, "on_cpu")["reasons"] == ["runs on cpu; the call is on cuda"]


def test_an_architecture_that_is_not_here_is_a_reason(cli, register):
    register(name="future", capabilities=Capabilities(devices=("cuda",), compute_capability=(99, 0)))
    done = cli("explain", *words("--device cuda --impl future --json"))
    assert done.status == 1
    assert "needs compute capability 99.0" in verdict(done.data, "future")["reasons"][0]


def test_a_gpu_that_is_not_here_can_be_asked_about(cli, register):
    register(name="hopper", capabilities=Capabilities(devices=("cuda",), compute_capability=(9, 0)))
    options = words("--device cuda --dtype bfloat16 --impl hopper --json")
    assert cli("explain", *options, "--capability", "9.0").data["chosen"] == "hopper"
    done = cli("explain", *options, "--capability", "8.9")
    assert done.status == 1
    assert verdict(done.data, "hopper")["reasons"] == ["needs compute capability 9.0 or later, found 8.9"]


@pytest.mark.parametrize("gpu", ["7.5", "8.0", "9.0", "10.0", "12.0"])
def test_every_implementation_answers_for_a_gpu_that_is_not_here(cli, gpu):
    data = cli("explain", *words(f"--device cuda --dtype float16 --capability {gpu} --grad --causal --json")).data
    assert data["chosen"] == "torch"
    assert {candidate["name"] for candidate in data["candidates"]} == set(attnplug.list_flash_attention_impls())
    said = str([candidate["reasons"] for candidate in data["candidates"]])
    assert "raised" not in said and "no such device" not in said


def test_an_empty_call_needs_no_kernel_and_is_no_failure(cli):
    done = cli("explain", "--query", "1,8,0,64", "--softcap", "30")
    assert done.status == 0 and done.out.endswith("the result follows from the formulas.\n")
    data = cli("explain", "--query", "1,8,0,64", "--json").data
    assert data["empty"] is True and data["chosen"] is None


def test_status_1_and_a_sentence_when_nothing_would_run(cli, register):
    register(name="bare")
    done = cli("explain", *words("--impl bare --softcap 30"))
    assert done.status == 1
    assert done.out.splitlines()[-1].startswith("Nothing would run")
    assert cli("explain", *words("--impl bare --softcap 30 --json")).data["chosen"] is None


@pytest.mark.parametrize("dtype", ["bf16", "BF16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_taken_as_tables_print_it(cli, register, dtype):
    register(name="half", capabilities=Capabilities(dtypes=("bfloat16",)))
    assert cli("explain", *words(f"--dtype {dtype} --impl half --json")).data["chosen"] == "half"


def test_families_are_taken_in_any_case(cli):
    for written in ("math", "Math", "MATH"):
        assert cli("explain", *words(f"--scope {written} --json")).data["chosen"] == "aten_math"


def test_the_nearest_miss_is_named_with_what_would_let_it_run(cli):
    done = cli("explain", *words("--impl aten_flash --softcap 30"))
    assert done.status == 1
    assert "Nearest miss: math_ref: outside --impl aten_flash. Remedy: --impl math_ref" in done.out


def test_what_is_not_installed_can_be_the_nearest(shell):
    words_ = words("--softcap 30 --dtype bf16 --device cuda --capability 9.0")
    done = shell("explain", *words_, ATTNPLUG_LOAD="math_ref")
    assert done.status == 0 and done.out.endswith("math_ref would run.\n")
    (line,) = (line for line in done.out.splitlines() if line.startswith("Nearest miss: "))
    assert line.startswith("Nearest miss: flash_triton: ")
    assert line.endswith("Remedy: export ATTNPLUG_LOAD=flash_triton,math_ref")


def test_dynamo_is_not_imported(shell):
    said = shell("explain", *words("--softcap 30"), options=("-X", "importtime")).err
    modules = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert "torch" in modules and "torch._dynamo" not in modules


def test_scope_takes_families_and_names_and_their_order(cli):
    assert cli("explain", *words("--scope MATH --json")).data["chosen"] == "aten_math"
    both = words("--scope aten_math,aten_flash --json")
    assert cli("explain", *both).data["chosen"] == "aten_flash"
    assert cli("explain", *both, "--set-priority").data["chosen"] == "aten_math"
    reasons = verdict(cli("explain", *both).data, "torch")["reasons"]
    assert reasons == ["outside sdpa_kernel(['aten_math', 'aten_flash'])"]


@pytest.mark.parametrize("option", ["--impl", "--scope"])
def test_an_unknown_name_is_a_usage_error_with_the_closest(cli, option):
    done = cli("explain", *words(f"{option} aten_mth"))
    assert (done.status, done.out) == (2, "")
    assert f"{option}: unknown implementation 'aten_mth'; did you mean 'aten_math'?" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--query 1,8,x", "--query: expected numbers such as 1,8,128,64, got '1,8,x'"),
        ("--query 1,-8,2,2", "--query: expected numbers"),
        ("enable_gqa=True", "unexpected enable_gqa=True; --help lists"),
        ("--query 64", "--query: expected at least 2 dimensions"),
        ("--key 1,2,128,64", "--key: has 2 heads, the query 8; unequal numbers need --gqa ("),
        ("--key 1,8,128,32", "--key: its head size 32"),
        ("--mask int", "--mask: expected bool or float"),
        ("--mask float:3,3", "--mask: shape (3, 3) does not broadcast"),
        ("--mask bool --mask-grad", "--mask-grad: needs --mask float"),
        ("--mask-grad", "--mask-grad: needs --mask float"),
        ("--window 3", "--window: expected LEFT,RIGHT"),
        ("--window -2,0", "--window: expected sides of -1"),
        ("--dropout 2", "--dropout: expected a probability"),
        ("--dtype int8", "--dtype: expected float16"),
        ("--device toaster", "--device: 'toaster' is not a device of PyTorch"),
        ("--capability 9.0", "--capability: is that of an NVIDIA GPU, and --device is cpu; add --device cuda"),
        ("--capability 90 --device cuda", "--capability: expected a compute capability such as 9.0"),
        ("--capability sm_90 --device cuda", "--capability: expected a compute capability such as 9.0"),
        ("--capability 0.3 --device cuda", "--capability: no GPU has 0.3"),
        ("--set-priority", "--set-priority: is about the order of --scope"),
        ("--paged 16", "--paged: needs --varlen"),
        (f"{PACKED} --paged 0", "--paged: expected a number above 0"),
        (f"{PACKED} --mask bool", "--mask: varlen_attn takes no attn_mask"),
        (f"{PACKED} --causal-variant upper-left", "--causal-variant: varlen_attn is always lower-right"),
        (f"{PACKED} --key 15,8,64", "--key: has 15 tokens, but the lengths of --varlen add up to 16"),
        ("--query 12,8,64 --varlen 5,3", "--query: has 12 tokens, but the lengths of --varlen add up to 8"),
        ("--varlen 5,3", "--query: with --varlen expected tokens,heads,head size"),
        ("--query 8,8,64 --varlen 5,3:4", "--varlen: expected as many sequences of keys as of queries"),
    ],
)
def test_a_call_without_meaning_is_a_usage_error_that_says_why(cli, options, said):
    done = cli("explain", *words(options))
    assert (done.status, done.out) == (2, "")
    assert f"error: {said}" in done.err.replace("argument --", "--") and "Traceback" not in done.err


@pytest.mark.filterwarnings("default")
def test_a_broken_kernel_is_a_reason_and_a_readable_warning(cli, register):
    register(name="wreck", kernel="absent_module.kernel")
    done = cli("explain", *words("--impl wreck"))
    assert done.status == 1 and "is broken: ModuleNotFoundError" in done.out
    assert done.err.startswith("attnplug: warning: the kernel of implementation 'wreck'")
    assert done.err.count("\n") == 1


def test_kernels_are_imported_outside_fake_mode(cli, register, tmp_path, monkeypatch):
    """A tensor that a kernel makes when it is imported is a real one, and stays usable after."""
    (tmp_path / "kernel_with_table.py").write_text(
        "import torch\nTABLE = torch.arange(3)\n\ndef forward(params):\n    raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    register(name="tabled", kernel="kernel_with_table")
    assert cli("explain", *words("--impl tabled --device cuda")).status == 0
    import kernel_with_table

    assert kernel_with_table.TABLE.tolist() == [0, 1, 2]


def test_the_table_names_options_as_they_are_typed(cli):
    out = cli("explain", *words("--impl aten_math")).out
    assert "outside --impl aten_math" in out and "impl=" not in out
