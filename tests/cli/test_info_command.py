"""`attnplug info` is pasted into bug reports: it must come on a broken machine too, and tell no names."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import attnplug
import foreign_cudnn


def test_the_report_holds_versions_and_every_implementation(cli):
    data = cli("info", "--json").data
    versions = data["versions"]
    assert versions["attnplug"] == attnplug.__version__
    assert versions["python"].startswith(platform.python_version())
    assert versions["torch"] == torch.__version__
    assert versions["torch commit"] == torch.version.git_version
    assert versions["cuda runtime"] == torch.version.cuda
    assert [item["name"] for item in data["implementations"]] == [record.name for record in attnplug.list_impls()]


def test_text_and_json_tell_the_same(cli, register):
    register(name="rocket", requires=("absent_module",))
    text, data = cli("info").out, cli("info", "--json").data
    for name, value in {**data["versions"], **data["environment"]}.items():
        shown = "none" if value is None else value
        assert re.search(rf"^ *{re.escape(name)} +{re.escape(shown)}$", text, re.MULTILINE), name
    for item in data["implementations"]:
        line = next(line for line in text.splitlines() if line.split()[:1] == [item["name"]] and item["status"] in line)
        assert item["distribution"] in line and item["version"] in line and line.endswith(item["reason"])


@pytest.mark.parametrize("package", ["triton", "transformers", "flash-attn", "xformers"])
def test_packages_are_reported(cli, package):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = None
    assert cli("info", "--json").data["versions"][package] == version


def test_packages_are_not_imported(shell):
    done = shell("info", options=("-X", "importtime"))
    modules = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert "torch" in modules and not modules & {"transformers", "triton", "flash_attn", "xformers"}


def test_variables_that_matter_are_in_it_and_others_are_not(cli, monkeypatch):
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "1")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("MY_TOKEN", "secret")
    environment = cli("info", "--json").data["environment"]
    assert environment["TRITON_PRINT_AUTOTUNING"] == "1"
    assert environment["TORCHINDUCTOR_MAX_AUTOTUNE"] == "0"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert "secret" not in cli("info").out


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/users/ada/cache", "~/cache"),
        ("/users/ada", "~"),
        ("/users/adamant/cache", "/users/adamant/cache"),
        ("/scratch/users/ada/cache", "/scratch/users/<user>/cache"),
        ("/scratch/ada/cache", "/scratch/<user>/cache"),
        ("/home/grace/cache", "/home/<user>/cache"),
        (r"C:\Users\grace\cache", r"C:\Users\<user>\cache"),
        ("/a:/home/grace/b:/home/alan", "/a:/home/<user>/b:/home/<user>"),
        ("ada", "ada"),
    ],
)
def test_home_directories_and_user_names_do_not_show(cli, monkeypatch, path, shown):
    monkeypatch.setenv("HOME", "/users/ada")
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("TORCH_HOME", path)
    assert cli("info", "--json").data["environment"]["TORCH_HOME"] == shown
    assert shown in cli("info").out


def test_a_home_at_the_root_hides_nothing(cli, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("TORCH_HOME", "/opt/models")
    assert cli("info", "--json").data["environment"]["TORCH_HOME"] == "/opt/models"


@pytest.mark.filterwarnings("default")
def test_a_reason_does_not_show_the_home_directory(cli, register, tmp_path, monkeypatch):
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "kernel_that_fails.py").write_text("raise OSError('no such driver')\n")
    monkeypatch.syspath_prepend(tmp_path / "ada")
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    register(name="wreck", kernel="kernel_that_fails")
    cli("explain", "--query", "1,1,4,8", "--impl", "wreck")
    reason = next(item for item in cli("info", "--json").data["implementations"] if item["name"] == "wreck")["reason"]
    assert reason == "OSError: no such driver (in ~/kernel_that_fails.py, line 1)"


def test_gpus_are_listed_with_capability_and_memory(cli, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA Example", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    expected = {"name": "NVIDIA Example", "compute capability": "9.0", "memory": "80.0 GiB"}
    assert cli("info", "--json").data["gpus"] == [expected, expected]
    assert "name NVIDIA Example, compute capability 9.0, memory 80.0 GiB" in cli("info").out


def test_gpus_that_fail_are_reported_and_the_rest_still_comes(cli, monkeypatch):
    def fail():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", fail)
    done = cli("info", "--json")
    assert done.status == 0 and done.data["versions"]["torch"] == torch.__version__
    assert done.data["gpus"] == [{"name": "failed: RuntimeError: the driver is too old"}]


def test_a_cudnn_that_pytorch_complains_of_takes_no_other_version_out_of_the_report(cli, monkeypatch):
    foreign_cudnn.install(monkeypatch)
    versions = cli("info", "--json").data["versions"]
    assert versions["torch"] == torch.__version__ and versions["cuda runtime"] == torch.version.cuda
    assert versions["cudnn"] == f"failed: RuntimeError: {foreign_cudnn.COMPLAINT.strip()}"


@pytest.mark.skipif(sys.platform == "win32", reason="writes a shell script")
def test_the_driver_is_what_nvidia_smi_says(cli, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert cli("info", "--json").data["versions"]["nvidia driver"] == "570.86.15"


def test_a_torch_that_cannot_be_imported_is_reported_and_the_rest_still_comes(shell, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    done = shell("info", options=(), PYTHONPATH=str(tmp_path))
    assert done.status == 0 and "Traceback" not in done.err
    assert "torch          failed: OSError: libcudart.so.99" in done.out and "aten_flash" in done.out


def test_a_meaningless_variable_is_reported_and_the_rest_still_comes(shell):
    done = shell("info", ATTNPLUG_STRIC="1")
    assert done.status == 0
    assert "failed: ConfigError: ATTNPLUG_STRIC: no such variable" in done.out and torch.__version__ in done.out


def test_warnings_are_part_of_the_report(shell):
    done = shell("info", ATTNPLUG_DISABLE="nosuch")
    assert not done.err
    assert "warnings:\n  ATTNPLUG_DISABLE: no installed plugin is named 'nosuch'" in done.out
